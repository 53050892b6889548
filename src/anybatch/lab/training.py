"""One training run: a network, a method, a batch size, a seed -> accuracy, curves and the facts to reproduce them.

Every layer sees `batch` images at a time. Below the gradient batch (32), either gradients are accumulated, so that
every batch size makes the same updates (mode "accumulate"), or each micro-batch makes its own step at lr * batch / 32
(mode "step"). Runs of one seed share initial weights and the order of the images, whatever the method: they are paired.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.lab import machine, networks
from anybatch.lab.checkpoint import Checkpoints, Counters, State
from anybatch.lab.config import RunConfig
from anybatch.lab.data import Dataset
from anybatch.lab.processes import ALONE, Processes
from anybatch.lab.schedule import Order, Schedule
from anybatch.training import attach, param_groups

__all__ = ["Progress", "RunConfig", "RunResult", "Stopped", "build_model", "evaluate", "run_key", "train_run"]

EVALUATION_BATCH = 500


class Progress(NamedTuple):
    """Where a run stands: images trained on, of how many, and the last test accuracy, if one was taken."""

    images: int
    total: int
    accuracy: float | None


class Stopped(Exception):
    """A run ended before its last step, because it was asked to.

    Attributes:
        done: how far it had come.
    """

    def __init__(self, done: Counters) -> None:
        super().__init__(f"stopped after {done.images} images")
        self.done = done


@dataclass(frozen=True)
class RunResult:
    """What came of a run; `record()` is its line in runs.jsonl.

    Attributes:
        status: "diverged" if a loss was not finite: the run ended there, and `accuracy` is None.
        accuracy: on the test images, in evaluation mode, after the last epoch; in percent. Likewise `loss`.
        train_accuracy: on the training images, in evaluation mode, after the last epoch; in percent.
        curve: per epoch, {"epoch", "accuracy", "loss"} on the test images.
        train_loss: means of 1/20 epoch each, in training mode, as [epochs, loss].
    """

    key: str
    config: RunConfig
    norm: str
    status: Literal["finished", "diverged"]
    accuracy: float | None
    loss: float | None
    train_accuracy: float | None
    seconds: float
    curve: list[dict[str, float | None]]
    train_loss: list[list[float]]
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The run as plain values, for JSON."""
        record = asdict(self)
        facts: dict[str, Any] = record.pop("facts")
        return record | facts


def run_key(config: RunConfig, dataset: Dataset) -> str:
    """Sixteen hexadecimal digits that name a run: configuration, what its method resolves to, and the data."""
    norm = repr(config.norm(len(dataset.train_images)))
    for later in (
        ", sync=False",
        ", kind='ring', positions=16, storage='full', refresh=2",
        ", refresh=1",
    ):  # options as they were before they came
        norm = norm.replace(later, "")
    facts = [config.facts(), norm, dataset.fingerprint]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def build_model(config: RunConfig, dataset: Dataset) -> nn.Module:
    """The network with its method, initialised from the seed, on its device, in training mode."""
    torch.manual_seed(config.seed)
    model = networks.build(config.network, len(dataset.classes), dataset.train_images.shape[1])
    example = dataset.normalise(dataset.train_images[:2])
    convert_(model, config.norm(len(dataset.train_images)), example_inputs=(example,))
    return model.to(config.device).train()


def train_run(
    config: RunConfig,
    dataset: Dataset,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    processes: Processes = ALONE,
) -> RunResult:
    """Trains once and measures.

    Args:
        config: what to train.
        dataset: what to train on.
        progress: called after every step.
        checkpoint: a folder to save to after every epoch.
        resume: go on from `checkpoint`, exactly as if never stopped.
        save_every: steps after which to save besides.
        stop: asked after every step whether to end there.
        say: told, in a line each, what of the checkpoint could not be had.
        processes: that train together, each of them calling this with the same arguments. The main one's result
            counts; the others evaluate nothing.

    Raises:
        AnybatchError: the configuration does not fit the machine or the data, or the checkpoint the configuration.
        Stopped: `stop` said so, in one of the processes; all of it is saved, if there is a `checkpoint`.
    """
    machine.check_device(config.device)
    schedule = Schedule.of(config, len(dataset.train_images), processes.count)
    order = Order(config.seed, len(dataset.train_images), schedule.epoch)
    model = build_model(config, dataset)
    optimizer = torch.optim.SGD(_groups(model, config), lr=schedule.peak_lr, momentum=config.momentum)
    attach(model, optimizer)
    state = State(model, optimizer)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, config, dataset, processes)
    if checkpoints is not None:
        if resume:
            checkpoints.load(state, say)
            if state.done.images == schedule.total:
                say("the run is finished: nothing is left to train")
        else:
            checkpoints.refuse_to_overwrite()
    done = state.done
    if done.images % schedule.step:
        raise AnybatchError(
            f"the run stopped after {done.images} images, in the middle of a step of {processes.count} processes: "
            f"resume it with as many as before"
        )
    shared = processes.share_gradients(model)
    started = time.perf_counter() - done.seconds
    diverged = False

    while done.images < schedule.total and not diverged:
        model.train()
        indices = processes.part(order.after(done.images, schedule.step))
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(done.images)
        state.losses += _step(shared, optimizer, dataset, indices, config.device, schedule.micro_batches, processes)
        done.images += schedule.step
        if schedule.ends_window(done.images):
            mean_loss = processes.mean(float(torch.stack(state.losses).mean()))
            state.losses.clear()
            diverged = not math.isfinite(mean_loss)
            if diverged:
                break
            done.train_loss.append([round(done.images / schedule.epoch, 4), round(mean_loss, 5)])
        if progress is not None:
            progress(Progress(done.images, schedule.total, done.accuracy))
        if schedule.ends_epoch(done.images):
            accuracy, test_loss = evaluate(model, dataset, "test", config.device) if processes.is_main else (None, None)
            done.curve.append({"epoch": len(done.curve) + 1, "accuracy": accuracy, "loss": test_loss})
        done.seconds = time.perf_counter() - started
        stopping = processes.any(stop()) and done.images < schedule.total
        due = save_every is not None and done.images // schedule.step % save_every == 0
        if checkpoints is not None and (stopping or due or schedule.ends_epoch(done.images)):
            checkpoints.save(state)
        if stopping:
            raise Stopped(done)

    measured = processes.is_main and not diverged
    return RunResult(
        key=run_key(config, dataset),
        config=config,
        norm=repr(config.norm(len(dataset.train_images))),
        status="diverged" if diverged else "finished",
        accuracy=None if diverged else done.accuracy,
        loss=None if diverged else done.curve[-1]["loss"],
        train_accuracy=evaluate(model, dataset, "train", config.device)[0] if measured else None,
        seconds=round(time.perf_counter() - started, 3),
        curve=done.curve,
        train_loss=done.train_loss,
        fingerprint=dataset.fingerprint,
        facts={
            "machine": machine.machine(config.device),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, split: Literal["train", "test"], device: str
) -> tuple[float, float | None]:
    """Accuracy in percent and mean loss (None if not finite) of `model` in evaluation mode."""
    images, labels = (
        (dataset.train_images, dataset.train_labels) if split == "train" else (dataset.test_images, dataset.test_labels)
    )
    model.eval()
    correct, loss = 0.0, 0.0
    for start in range(0, len(labels), EVALUATION_BATCH):
        y = labels[start : start + EVALUATION_BATCH].to(device)
        logits = model(dataset.normalise(images[start : start + EVALUATION_BATCH].to(device)))
        correct += float((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
    mean_loss = loss / len(labels)
    return round(100 * correct / len(labels), 4), round(mean_loss, 5) if math.isfinite(mean_loss) else None


def _groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    if config.norm_weight_decay is None:
        return [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
    return param_groups(model, config.weight_decay, config.norm_weight_decay)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    indices: Tensor,
    device: str,
    micro_batches: int,
    processes: Processes,
) -> list[Tensor]:
    """One step of the optimizer; the losses of its micro-batches."""
    images = dataset.normalise(dataset.train_images[indices].to(device)).chunk(micro_batches)
    labels = dataset.train_labels[indices].to(device).chunk(micro_batches)
    optimizer.zero_grad()
    losses = []
    for before_last, x, y in zip(reversed(range(micro_batches)), images, labels, strict=True):
        with processes.gradients(model, send=not before_last):
            loss = F.cross_entropy(model(x), y)
            torch.autograd.backward(loss / micro_batches)
        losses.append(loss.detach())
    optimizer.step()
    return losses
