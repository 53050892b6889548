"""The Python in README and method pages runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
# Of docs/hosts see test_hosts.py, of docs/extend.md test_extend.py.
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "hosts" and p.stem != "extend"),
]
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.relative_to(ROOT)}:{i}",
        marks=[pytest.mark.filterwarnings("default")] if "torch.compile" in block else [],  # the compiler's own
    )
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), company(tmp_path / "state.pt"))
    printed = capsys.readouterr().out
    assert bool(printed) == ("print(" in code)
    assert "converted" in printed or "print(" not in code or "convert_" not in code


def company(path: Path | None = None) -> dict[str, Any]:
    """What a reader brings along: a model, images, a loader, a loss, an optimizer; ``path``, to save to."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    loader = [(torch.randn(2, 3, 8, 8), torch.randint(5, (2,))) for _ in range(5)]
    return {
        "model": model,
        "images": loader[0][0],
        "loader": loader,
        "loss_function": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "path": path,
    }


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
