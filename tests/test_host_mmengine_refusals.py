"""What MMEngine's norms and hook refuse, and what the hook warns of."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anybatch as ab

from .test_host_mmengine import (  # first: it imports MMEngine without its warnings
    CBN,
    AnybatchHook,
    ConvModule,
    Examples,
    Net,
    build_norm_layer,
    pytestmark,  # noqa: F401
    runner,
    trusted,  # noqa: F401
)

# isort: split
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm

from anybatch.integrations.mmengine import pair_


class Warned(Hook):
    def before_train(self, runner: Any) -> None:
        self.said: list[str] = []
        runner.logger.warning = self.said.append


def test_resumed_without_a_history(tmp_path: Path) -> None:
    runner(tmp_path / "a", 6, Net({"type": "BN"}), hooks=[]).train()
    warned = Warned()
    run = runner(
        tmp_path / "b", 12, hooks=[warned, AnybatchHook()], resume=True, load_from=str(tmp_path / "a" / "iter_6.pth")
    )
    run.train()
    assert "AnybatchHook: the checkpoint has no history; the past is gathered anew" in warned.said


def test_a_norm_that_follows_no_map(tmp_path: Path) -> None:
    """ConvModule's shortcut for evaluation hides the convolution: a warning, not an error."""

    class Fast(Net):
        def __init__(self) -> None:
            super().__init__(CBN)
            self.stem = ConvModule(3, 4, 3, norm_cfg=CBN, efficient_conv_bn_eval=True)

    warned = Warned()
    runner(tmp_path, 1, Fast(), hooks=[warned, AnybatchHook()]).train()
    assert any("stem.bn" in line and "1 without compensation" in line for line in warned.said)


def test_not_paired_yet() -> None:
    net = Net(CBN)
    images = [torch.randn(3, 9, 7)]
    with pytest.raises(ab.AnybatchError, match="CBN: built before its model, it does not know yet what feeds it"):
        net(images, [])
    assert not pair_(net, (images, [])).unpaired
    net(images, [])


def test_no_norm_of_ours(tmp_path: Path) -> None:
    rebuilt = convert_sync_batchnorm(Net(CBN))
    for model in (Net({"type": "BN"}), rebuilt):
        with pytest.raises(ab.AnybatchError, match=r"AnybatchHook: the model has no norm of anybatch. Give norm_cfg="):
            runner(tmp_path, 1, model).train()


def test_no_first_example(tmp_path: Path) -> None:
    class Shy(Examples):
        def __getitem__(self, i: int) -> Any:
            if i == 0:
                raise OSError("no such file")
            return super().__getitem__(i)

    run = runner(tmp_path, 1)
    run._train_dataloader["dataset"] = Shy()
    with pytest.raises(
        ab.AnybatchError, match=r"no first example of the training set .* \(OSError: no such file\); give"
    ):
        run.train()


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"type": "CBN", "windw": 3}, "CBN: no option 'windw'; there are window"),
        ({"type": "IEBN"}, "has to know what follows the norm, in evaluation too"),
    ],
)
def test_refused(cfg: dict[str, Any], said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        build_norm_layer(cfg, 4)


def test_without_mmengine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmengine.hooks", None)
    monkeypatch.delitem(sys.modules, "anybatch.integrations.mmengine")
    with pytest.raises(ab.AnybatchError, match=r"pip install 'anybatch\[mmengine\]'"):
        importlib.import_module("anybatch.integrations.mmengine")
