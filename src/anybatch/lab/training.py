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
from anybatch.lab import checkpoint as checkpoints
from anybatch.lab import machine, networks
from anybatch.lab.config import RunConfig
from anybatch.lab.data import Dataset
from anybatch.training import attach, param_groups

__all__ = ["Progress", "RunConfig", "RunResult", "build_model", "evaluate", "run_key", "train_run"]

EVALUATION_BATCH = 500
CURVE_POINTS = 20  # of the training loss, per epoch


class Progress(NamedTuple):
    """Where a run stands: images trained on, of how many, and the last test accuracy, if one was taken."""

    images: int
    total: int
    accuracy: float | None


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
    facts = [config.facts(), repr(config.norm(len(dataset.train_images))), dataset.fingerprint]
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
) -> RunResult:
    """Trains once and measures.

    Args:
        config: what to train.
        dataset: what to train on.
        progress: called after every gradient batch.
        checkpoint: a folder to save to after every epoch.
        resume: go on from `checkpoint`, at the epoch it was saved after, exactly as if never stopped.

    Raises:
        AnybatchError: the configuration does not fit the machine or the data, or the checkpoint the configuration.
    """
    machine.check_device(config.device)
    updates = config.updates(len(dataset.train_images))
    if updates == 0:
        raise AnybatchError(
            f"{len(dataset.train_images)} training images do not fill one gradient batch of {config.gradient_batch}: "
            f"give more images"
        )
    micro_batches = config.gradient_batch // config.batch
    steps_per_update = micro_batches if config.mode == "step" else 1
    steps = config.epochs * updates * steps_per_update
    peak_lr = config.lr * config.gradient_batch / 32 / steps_per_update
    total_images = config.epochs * updates * config.gradient_batch
    window = max(1, updates // CURVE_POINTS)

    model = build_model(config, dataset)
    optimizer = torch.optim.SGD(_groups(model, config), lr=peak_lr, momentum=config.momentum)
    attach(model, optimizer)
    order = torch.Generator().manual_seed(config.seed)
    done = checkpoints.Counters()
    if checkpoint is not None and not resume:
        checkpoints.refuse_to_overwrite(checkpoint)
    if checkpoint is not None and resume:
        done = checkpoints.load(checkpoint, config, dataset, model, optimizer, order)
    started = time.perf_counter() - done.seconds
    diverged = False

    while done.epoch < config.epochs and not diverged:
        model.train()
        losses: list[Tensor] = []
        permutation = torch.randperm(len(dataset.train_images), generator=order)[: updates * config.gradient_batch]
        for update, indices in enumerate(permutation.view(updates, -1).unbind()):
            images = dataset.normalise(dataset.train_images[indices].to(config.device))
            labels = dataset.train_labels[indices].to(config.device)
            optimizer.zero_grad()
            for x, y in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
                loss = F.cross_entropy(model(x), y)
                losses.append(loss.detach())
                torch.autograd.backward(loss / (micro_batches // steps_per_update))
                if config.mode == "step":
                    _step(optimizer, peak_lr, done, steps)
                    optimizer.zero_grad()
            if config.mode == "accumulate":
                _step(optimizer, peak_lr, done, steps)

            if (update + 1) % window == 0 or update + 1 == updates:
                mean_loss = float(torch.stack(losses).mean())
                losses.clear()
                diverged = not math.isfinite(mean_loss)
                if diverged:
                    break
                done.train_loss.append([round(done.epoch + (update + 1) / updates, 4), round(mean_loss, 5)])
            if progress is not None:
                images_done = (done.epoch * updates + update + 1) * config.gradient_batch
                progress(Progress(images_done, total_images, done.accuracy))
        if diverged:
            break
        accuracy, test_loss = evaluate(model, dataset, "test", config.device)
        done.epoch += 1
        done.curve.append({"epoch": done.epoch, "accuracy": accuracy, "loss": test_loss})
        done.seconds = time.perf_counter() - started
        if checkpoint is not None:
            checkpoints.save(checkpoint, config, dataset, model, optimizer, order, done)

    return RunResult(
        key=run_key(config, dataset),
        config=config,
        norm=repr(config.norm(len(dataset.train_images))),
        status="diverged" if diverged else "finished",
        accuracy=None if diverged else done.accuracy,
        loss=None if diverged else done.curve[-1]["loss"],
        train_accuracy=None if diverged else evaluate(model, dataset, "train", config.device)[0],
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


def _step(optimizer: torch.optim.Optimizer, peak_lr: float, done: checkpoints.Counters, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = peak_lr * 0.5 * (1 + math.cos(math.pi * done.step / steps))
    optimizer.step()
    done.step += 1
