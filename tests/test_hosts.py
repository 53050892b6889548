"""The examples of docs/hosts run as they are printed, and train layers of this library.

A host that cannot be imported fails here. detectron2, which is not on the package index, is stood in for.
"""

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from anybatch.layers.base import NormLayer
from anybatch.layers.history import HistoryLayer

from . import detectron2_standin

PAGES = Path(__file__).parents[1] / "docs" / "hosts"
# Blocks each page has at least.
HOSTS = {
    "torchvision": 2,
    "timm": 2,
    "transformers": 2,
    "smp": 1,
    "detectron2": 1,
    "monai": 1,
    "lightning": 1,
    "accelerate": 1,
    "mmengine": 1,
}


def blocks(host: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (PAGES / f"{host}.md").read_text(), re.DOTALL | re.MULTILINE)


# What hosts warn of by themselves, and a page cannot help.
IGNORED = {
    "lightning": [
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning's use of torch.utils._pytree
        "ignore:The '.*_dataloader' does not have many workers",
    ],
    "mmengine": [
        "ignore:`torch.jit",  # mmcv scripts a function when it is imported
        "ignore:.*instance named of .* has been created",  # a Runner a process is what MMEngine expects
        "ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected",  # the page says why
    ],
}
EXAMPLES = [
    pytest.param(host, i, id=f"{host}-{i}", marks=[pytest.mark.filterwarnings(line) for line in IGNORED.get(host, ())])
    for host, least in HOSTS.items()
    for i in range(max(least, len(blocks(host))))
]


class Watch:
    """What layers of this library do while a block runs: those that ran in training, as they were at first."""

    def __init__(self) -> None:
        self.seen: dict[NormLayer, dict[str, torch.Tensor]] = {}

    def __call__(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, NormLayer) and module.training and torch.is_grad_enabled():
            self.seen.setdefault(module, {name: t.detach().clone() for name, t in module.state_dict().items()})

    @property
    def trained(self) -> list[NormLayer]:
        """Those whose gamma an optimizer has moved, and whose running mean a forward has."""
        return [
            layer
            for layer, before in self.seen.items()
            if not torch.equal(layer.weight, before["weight"])
            and not torch.equal(layer.running_mean, before["running_mean"])
        ]


@pytest.mark.parametrize(("host", "i"), EXAMPLES)
def test_the_example_runs_and_trains(
    host: str, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks(host)[i]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.chdir(tmp_path)
    if host == "detectron2":
        detectron2_standin.install(monkeypatch)
    watch = Watch()
    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    names: dict[str, Any] = {"__name__": "example"}
    try:
        with mock.patch.dict(os.environ):  # which a page may set
            exec(compile(code, f"{host}.md", "exec"), names)
    finally:
        hook.remove()
    trained = watch.trained
    assert trained
    assert set(trained) == set(watch.seen)
    assert all(isinstance(layer, HistoryLayer) and layer.histories for layer in trained)
    assert all(layer.weight.isfinite().all() and layer.running_var.isfinite().all() for layer in trained)
    assert not any(isinstance(module, NormLayer) for module in names["deploy"].modules())
    assert capsys.readouterr().out or "print(" not in code


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text()))
    assert linked == set(HOSTS) == {page.stem for page in PAGES.glob("*.md")} - {"README"}


@pytest.mark.parametrize("host", [*HOSTS, "README"])
def test_links_lead_somewhere(host: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (PAGES / f"{host}.md").read_text()):
        assert target.startswith("http") or (PAGES / target).exists(), target
