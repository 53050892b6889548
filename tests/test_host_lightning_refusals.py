"""What the Lightning callback refuses, and what it warns of."""

import importlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.integrations.lightning import Convert

from .test_host_lightning import EXAMPLE, QUIET, Module, fit, loader, module_of, pytestmark  # noqa: F401


class BuildsLater(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()

    def configure_model(self) -> None:
        self.net = Module().net


def test_resumed_without_a_history(tmp_path: Path) -> None:
    module = module_of()
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="Convert: the checkpoint was saved without it and has no history; the past"):
        fit(module_of(), Convert(ab.CBN(), EXAMPLE), epochs=2, ckpt=tmp_path / "a.ckpt")


@pytest.mark.parametrize(("histories", "said"), [([], "Convert: 0 process.es. saved their histories, and 1 go on")])
def test_resumed_by_another_number_of_processes(histories: list[Any], said: str, tmp_path: Path) -> None:
    fit(module_of(), Convert(ab.CBN(), EXAMPLE)).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**saved, "anybatch_histories": histories}, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match=said):
        fit(module_of(), Convert(ab.CBN(), EXAMPLE), epochs=2, ckpt=tmp_path / "b.ckpt")


def test_a_damaged_history(tmp_path: Path) -> None:
    fit(module_of(), Convert(ab.CBN(), EXAMPLE)).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**saved, "anybatch_histories": {}}, tmp_path / "b.ckpt")
    with pytest.raises(ab.AnybatchError, match="Convert: a dict is no list of histories, one a process; save the"):
        fit(module_of(), Convert(ab.CBN(), EXAMPLE), epochs=2, ckpt=tmp_path / "b.ckpt")


def test_resumed_with_another_conversion(tmp_path: Path) -> None:
    fit(module_of(), Convert(ab.CBN(), EXAMPLE)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ab.AnybatchError, match="convert the model as it was converted when the state was saved"):
        fit(module_of(), Convert(ab.CBN(), EXAMPLE, where="net.1"), epochs=2, ckpt=tmp_path / "a.ckpt")


def test_refused_configs_and_inputs() -> None:
    with pytest.raises(ab.AnybatchError, match=r"Convert: the config is 'cbn'; give an instance such as ab.CBN"):
        Convert("cbn")  # type: ignore[arg-type]
    with pytest.raises(
        ab.AnybatchError, match="Convert: CBN has to know what stands around each norm; give example_inp"
    ):
        fit(module_of(), Convert(ab.CBN()))


def test_no_norm_yet() -> None:
    with pytest.raises(ab.AnybatchError, match="the module has no BatchNorm when the trainer sets it up; if it builds"):
        fit(module_of(BuildsLater), Convert(ab.CBN(), EXAMPLE))


def test_not_converted_by_itself() -> None:
    with pytest.raises(ab.AnybatchError, match=r"Convert.None.: the module has no layer of anybatch; call ab.convert_"):
        fit(module_of(BuildsLater), Convert(None))


def test_rebuilt_as_synchronised() -> None:
    class AsTheTrainerDoes(pl.Callback):  # with sync_batchnorm=True, where DistributedDataParallel allows it
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)

    with pytest.raises(ab.AnybatchError, match="sync_batchnorm=True has rebuilt the converted norms as SyncBatchNorm"):
        fit(module_of(), Convert(ab.CBN(), EXAMPLE), AsTheTrainerDoes())


def test_an_optimizer_made_before() -> None:
    class Early(Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.early

    fit(module_of(Early), Convert(ab.CBN(), EXAMPLE))  # adds no parameter
    with pytest.raises(
        ab.AnybatchError, match=r"made before the conversion and has not 'gate_weight' of 'net.1'; make it"
    ):
        fit(module_of(Early), Convert(ab.IEBN(), EXAMPLE))


def test_several_loaders_to_recalibrate_by() -> None:
    class Two(Module):
        def training_step(self, batch: Any, i: int) -> Tensor:
            return sum(super(Two, self).training_step(each, i) for each in batch)

    trainer = pl.Trainer(max_epochs=1, callbacks=[Convert(ab.CBN(), EXAMPLE, recalibrate=True)], **QUIET)
    with pytest.raises(ab.AnybatchError, match=r"recalibrate=True is for one training loader, and there are 2; call"):
        trainer.fit(module_of(Two), [loader(), loader()], loader(1))


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "anybatch.integrations.lightning")
    with pytest.raises(ab.AnybatchError, match=r"pip install 'anybatch\[lightning\]'"):
        importlib.import_module("anybatch.integrations.lightning")
