"""The Lightning callback: beside a loop written by hand, across a stop, and beside other callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from anybatch.integrations.lightning import Convert
from anybatch.layers.base import NormLayer

from .lives import assert_same, training_state
from .ranks import torchrun

pytestmark = [
    # Lightning calls a part of torch.utils._pytree that torch has deprecated since.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # It advises workers for loaders as small as these.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

EXAMPLE = torch.randn(1, 3, 9, 7)
METHODS = {"cbn": ab.CBN(window=4), "accumulated": ab.AccumulatedBN(), "iebn": ab.IEBN(window=3)}
QUIET: dict[str, Any] = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ConvertsItself(Module):
    def configure_model(self) -> None:
        if not isinstance(self.net[1], NormLayer):
            ab.convert_(self, ab.CBN(window=4), example_inputs=EXAMPLE)


def loader(batches: int = 5) -> DataLoader:
    g = torch.Generator().manual_seed(3)
    return DataLoader(
        TensorDataset(torch.randn(2 * batches, 3, 9, 7, generator=g), torch.arange(2 * batches) % 5), batch_size=2
    )


def module_of(kind: Callable[[], pl.LightningModule] = Module) -> pl.LightningModule:
    torch.manual_seed(7)
    return kind()


def fit(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 1, ckpt: Any = None, **options: Any) -> Any:
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **options})
    # Its own question of late: what a checkpoint may hold. Ours holds tensors and numbers.
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
    return trainer


def all_of(trainer: pl.Trainer, module: nn.Module) -> Any:
    return training_state(module), trainer.optimizers[0].state_dict()["state"]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_loop_by_hand(name: str, accumulate: int) -> None:
    module, by_hand = module_of(), module_of()
    trainer = fit(module, Convert(METHODS[name], EXAMPLE), epochs=2, accumulate_grad_batches=accumulate)

    ab.convert_(by_hand, METHODS[name], example_inputs=EXAMPLE)
    optimizer = by_hand.configure_optimizers()
    ab.attach(by_hand, optimizer)
    for _ in range(2):
        for i, batch in enumerate(loader(), start=1):
            (by_hand.training_step(batch, i) / accumulate).backward()
            if i % accumulate == 0 or i == len(loader()):
                optimizer.step()
                optimizer.zero_grad()
    assert_same(all_of(trainer, module), (training_state(by_hand), optimizer.state_dict()["state"]))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", [*METHODS, "by itself"])
def test_stopped_and_resumed(name: str, accumulate: int, tmp_path: Path) -> None:
    kind = Module if name in METHODS else ConvertsItself

    def callback() -> Convert:
        return Convert(METHODS[name], EXAMPLE) if name in METHODS else Convert(None)

    through = module_of(kind)
    wanted = all_of(fit(through, callback(), epochs=3, accumulate_grad_batches=accumulate), through)

    stopped = module_of(kind)
    fit(stopped, callback(), accumulate_grad_batches=accumulate).save_checkpoint(tmp_path / "a.ckpt")
    resumed = kind()
    trainer = fit(resumed, callback(), epochs=3, ckpt=tmp_path / "a.ckpt", accumulate_grad_batches=accumulate)
    assert_same(all_of(trainer, resumed), wanted)
    if name != "accumulated":  # which has no history between steps
        assert all(wanted[0]["history"].values())


TWO_PROCESSES = """
import warnings

from tests.torchvision_operators import declare

declare()  # before lightning imports torchvision
import lightning.pytorch as pl
import torch

import anybatch as ab
from tests.test_host_lightning import EXAMPLE, QUIET, Convert, Module, all_of, assert_same, loader, module_of

warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")


def fit(module, epochs, ckpt=None):
    convert = Convert(ab.CBN(window=4), EXAMPLE)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[convert], **QUIET, strategy="ddp", devices=2)
    trainer.fit(module, loader(6), loader(2), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return trainer


through, stopped, resumed = module_of(), module_of(), Module()
wanted = all_of(fit(through, 2), through)
fit(stopped, 1).save_checkpoint("two.ckpt")
assert_same(all_of(fit(resumed, 2, "two.ckpt"), resumed), wanted)
first, second = torch.load("two.ckpt", weights_only=True)["anybatch_histories"]
assert not torch.equal(first["layers"]["net.1"]["0"]["reductions"], second["layers"]["net.1"]["0"]["reductions"])
print("resumed")
"""


def test_stopped_and_resumed_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on from its own history."""
    monkeypatch.chdir(tmp_path)
    assert torchrun(2, TWO_PROCESSES).count("resumed") == 2


def test_converted_before_the_optimizer_and_once() -> None:
    module, callback = module_of(), Convert(ab.IEBN(shortcuts="converted"), EXAMPLE)
    trainer = fit(module, callback)
    optimizer = trainer.optimizers[0]
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(module.net[1].gate_weight) in held
    assert not optimizer._optimizer_step_post_hooks
    layer, report = module.net[1], callback.report
    trainer.validate(module, loader(1), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(1))
    assert module.net[1] is layer
    assert callback.report is report
    assert [row.name for row in report.converted] == ["net.1", "net.4"]


def test_two_callbacks_for_two_parts() -> None:
    module = module_of()
    trainer = fit(module, Convert(ab.CBN(), EXAMPLE, where="net.1"), Convert(ab.GN(groups=5), where="net.4"))
    layer = module.net[1]
    trainer.validate(module, loader(1), verbose=False)
    assert module.net[1] is layer
    assert isinstance(module.net[4], nn.GroupNorm)
    assert layer.histories


def test_the_example_input_array() -> None:
    module = module_of()
    module.example_input_array = EXAMPLE
    fit(module, Convert(ab.CBN()))
    assert len(module.net[1].maps) == 1


def test_checkpoints_fit_without_the_callback(tmp_path: Path) -> None:
    module = module_of()
    fit(module, Convert(ab.CBN(), EXAMPLE)).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Module().state_dict())
    plain = Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    x = torch.randn(2, 3, 9, 7)
    assert_same(plain(x), module.eval()(x))
    fresh = Module()
    trainer = pl.Trainer(callbacks=[callback := Convert(ab.CBN(), EXAMPLE)], **QUIET)
    trainer.test(fresh, loader(1), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert_same(fresh.eval()(x), plain(x))
    assert callback.report is not None
    assert not fresh.net[1].histories  # of training


@pytest.mark.parametrize("limit", [1.0, 3])
def test_recalibrated_at_the_end(limit: float) -> None:
    module, other = module_of(), module_of()
    fit(module, Convert(ab.CBN(), EXAMPLE, recalibrate=True), limit_train_batches=limit)
    fit(other, Convert(ab.CBN(), EXAMPLE), limit_train_batches=limit)
    ab.recalibrate_(other, list(loader())[: 5 if limit == 1.0 else 3])
    assert_same(training_state(module), training_state(other))


def test_recalibrated_as_it_trains() -> None:
    """In the precision of training, and by the module's own hook on batches."""

    class Named(Module):
        def on_before_batch_transfer(self, batch: Any, _: int) -> Any:
            return {"images": batch[0], "labels": batch[1]}

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch["images"]), batch["labels"])

        def validation_step(self, batch: Any, _: int) -> None:
            self(batch["images"])

    seen = []

    def forward(module: nn.Module, batch: Any) -> Tensor:
        out = module(batch["images"])
        seen.append(out.dtype)
        return out

    convert = Convert(ab.CBN(), EXAMPLE, recalibrate=True, forward=forward)
    fit(module_of(Named), convert, precision="bf16-mixed")
    assert seen == [torch.bfloat16] * 5


def test_the_scaler_is_attached() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(module.net[1].loss_scale)

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module_of(), Convert(ab.CBN(), EXAMPLE), Look(), plugins=[plugin])
    assert len(seen) == 5
    assert all(scale is scaler._scale for scale in seen)


@pytest.mark.parametrize("first", [True, False])
def test_an_average_beside_it(first: bool) -> None:
    module, alone = module_of(), module_of()
    average, convert = WeightAveraging(), Convert(ab.CBN(), EXAMPLE)
    fit(module, *([convert, average] if first else [average, convert]))
    fit(alone, Convert(ab.CBN(), EXAMPLE))
    # The average is what training leaves in the module; the history is that of the training beside it.
    assert_same(training_state(module)["history"], training_state(alone)["history"])
    assert not torch.equal(module.net[1].weight, alone.net[1].weight)
    assert not any(getattr(m, "histories", None) for m in average._average_model.modules())


def test_frozen_norms_keep_their_running_statistics() -> None:
    class Freeze(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[1], train_bn=False)

        def finetune_function(self, *_: Any) -> None:
            pass

    module = module_of()
    fit(module, Freeze(), Convert(ab.CBN(), EXAMPLE))
    assert_same(module.net[1].running_mean, torch.zeros(4))
    assert not torch.equal(module.net[4].running_mean, torch.zeros(5))
    assert not module.net[1].weight.requires_grad
