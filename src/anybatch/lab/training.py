"""One training run: a task, a method, a batch size, a seed -> a score, curves and the facts to reproduce them.

Every layer sees `batch` examples at a time. Below the gradient batch, either gradients are accumulated, so that every
batch size makes the same updates (mode "accumulate"), or each micro-batch makes its own step at a learning rate in
proportion (mode "step"). Runs of one seed share initial weights and the order of the examples, whatever the method:
they are paired.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.checkpoint import Checkpoints, Counters, State
from anybatch.lab.config import TrainConfig
from anybatch.lab.processes import ALONE, Processes
from anybatch.lab.schedule import Order, Schedule
from anybatch.lab.task import Scores, Task
from anybatch.training import attach, param_groups

__all__ = ["Progress", "RunResult", "Stopped", "optimizer_of", "run_key", "take_step", "train_run"]


class Progress(NamedTuple):
    """Where a run stands: examples trained on, of how many, and the last score, if one was taken."""

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
        accuracy: the task's score on the test examples, in evaluation mode, after the last epoch; in percent. Likewise
            `loss`.
        train_accuracy: on the training examples, where the task measures them.
        curve: per epoch, {"epoch", "accuracy", "loss"} on the test examples.
        train_loss: means of 1/20 epoch each, in training mode, as [epochs, loss].
        more: further measures of the task on the test examples, in percent.
    """

    key: str
    config: TrainConfig
    norm: str
    status: Literal["finished", "diverged"]
    accuracy: float | None
    loss: float | None
    train_accuracy: float | None
    seconds: float
    curve: list[dict[str, float | None]]
    train_loss: list[list[float]]
    fingerprint: str
    more: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The run as plain values, for JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "facts"}
        return own | {"config": self.config.record()} | self.facts


def run_key(task: Task[TrainConfig]) -> str:
    """Sixteen hexadecimal digits that name a run: configuration, what its method resolves to, and the data."""
    norm = task.norm()
    for later in (
        ", running='batch', alpha=0.0",
        ", sync=False, examples_per_group=None",
        ", sync=False",
        ", window_examples=64",
        ", kind='ring', positions=16, storage='full', refresh=2",
        ", refresh=1",
        ", running='batch'",
    ):  # options as they were before they came
        norm = norm.replace(later, "")
    facts = [task.config.facts(), norm, task.fingerprint]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def train_run(
    task: Task[TrainConfig],
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    processes: Processes = ALONE,
    watch: Callable[[int, Mapping[str, float]], None] = lambda seen, values: None,
    finish: Callable[[nn.Module], None] = lambda model: None,
) -> RunResult:
    """Trains once and measures.

    Args:
        task: what to train, on what.
        progress: called after every step.
        checkpoint: a folder to save to after every epoch.
        resume: go on from `checkpoint`, exactly as if never stopped.
        save_every: steps after which to save besides.
        stop: asked after every step whether to end there.
        say: told, in a line each, what of the checkpoint could not be had.
        processes: that train together, each of them calling this with the same arguments. The main one's result
            counts; the others evaluate nothing.
        watch: told the training loss and every measure by name as they are taken, after so many examples, in the main
            process.
        finish: given the trained model, in the main process.

    Raises:
        AnybatchError: the configuration does not fit the machine or the data, or the checkpoint the configuration.
        Stopped: `stop` said so, in one of the processes; all of it is saved, if there is a `checkpoint`.
    """
    config = task.config
    machine.check_device(config.device)
    schedule = Schedule.of(config, task.train_count, processes.count)
    if config.warmup_steps and config.warmup_steps >= schedule.total // schedule.step:
        steps = schedule.total // schedule.step
        say(f"the warm-up of {config.warmup_steps} steps does not end within the run's {steps}: train for more")
    order = Order(config.seed, task.train_count, schedule.epoch)
    model = task.build()
    optimizer = optimizer_of(model, config)
    state = State(model, optimizer)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, config, task.fingerprint, processes)
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
        batches = task.batches(indices, schedule.micro_batches, done.images)
        ahead = done.images + schedule.step
        if ahead < schedule.total:
            task.expect(processes.part(order.after(ahead, schedule.step)), ahead)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(done.images)
        state.losses += take_step(task, shared, optimizer, batches, processes)
        done.images += schedule.step
        if schedule.ends_window(done.images):
            mean_loss = processes.mean(float(torch.stack(state.losses).mean()))
            state.losses.clear()
            diverged = not math.isfinite(mean_loss)
            if diverged:
                break
            done.train_loss.append([round(done.images / schedule.epoch, 4), round(mean_loss, 5)])
            if processes.is_main:
                watch(done.images, {"train loss": mean_loss})
        if progress is not None:
            progress(Progress(done.images, schedule.total, done.accuracy))
        if schedule.ends_epoch(done.images):
            scores = task.evaluate(model, "test") if processes.is_main else Scores(None)
            done.curve.append({"epoch": len(done.curve) + 1, "accuracy": scores.score, "loss": scores.loss})
            done.more = scores.more
            if processes.is_main:
                watch(done.images, _named(config, scores))
        done.seconds = time.perf_counter() - started
        stopping = processes.any(stop()) and done.images < schedule.total
        due = save_every is not None and done.images // schedule.step % save_every == 0
        if checkpoints is not None and (stopping or due or schedule.ends_epoch(done.images)):
            checkpoints.save(state)
        if stopping:
            raise Stopped(done)

    measured = processes.is_main and not diverged
    train_score = task.evaluate(model, "train").score if measured else None
    if measured:
        finish(model)
    return RunResult(
        key=run_key(task),
        config=config,
        norm=task.norm(),
        status="diverged" if diverged else "finished",
        accuracy=None if diverged else done.accuracy,
        loss=None if diverged else done.curve[-1]["loss"],
        train_accuracy=train_score,
        seconds=round(time.perf_counter() - started, 3),
        curve=done.curve,
        train_loss=done.train_loss,
        fingerprint=task.fingerprint,
        more={} if diverged else done.more,
        facts={
            "machine": machine.machine(config.device),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _named(config: TrainConfig, scores: Scores) -> dict[str, float]:
    values = {config.measure: scores.score, "test loss": scores.loss, **scores.more}
    return {name: value for name, value in values.items() if value is not None}


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD as the configuration has it, known to the layers; the schedule sets the learning rate of every step."""
    if config.norm_weight_decay is None:
        groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
    else:
        groups = param_groups(model, config.weight_decay, config.norm_weight_decay)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    attach(model, optimizer)
    return optimizer


def take_step(
    task: Task[TrainConfig],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    processes: Processes,
) -> list[Tensor]:
    """One step of the optimizer, its gradients clipped where that was asked for; the losses of its micro-batches."""
    optimizer.zero_grad()
    losses = []
    for place, batch in enumerate(batches, 1):
        with processes.gradients(model, send=place == len(batches)):
            loss = task.loss(model, batch)
            torch.autograd.backward(loss / len(batches))
        losses.append(loss.detach())
    if task.config.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.config.clip)
    optimizer.step()
    return losses
