"""A run before it is started: the model and its norms, one step, and what memory and time it would take."""

import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.config import TrainConfig
from anybatch.lab.display import run_name
from anybatch.lab.processes import ALONE, started
from anybatch.lab.recipes import Published, read_recipe
from anybatch.lab.schedule import Schedule
from anybatch.lab.task import Task
from anybatch.lab.tasks import open_dry
from anybatch.lab.training import optimizer_of, take_step
from anybatch.reporting.page import duration

__all__ = ["dry_run"]

GIB = 2**30


def dry_run(config: TrainConfig, console: Console, recipe: Path | None = None) -> int:
    """Builds the model, takes two steps on generated data of the real shape, and prints what a run would take.

    Nothing is downloaded, and nothing but generated data is written. The steps are those of one of the recipe's
    processes; exchanging gradients, reading images and evaluation are left out.

    Args:
        config: of the run.
        console: to print on.
        recipe: that the configuration came from, by file or name; it says how many images, classes and processes.

    Returns:
        The exit code: 1 if a loss or a gradient is not finite.

    Raises:
        AnybatchError: the configuration does not fit the machine or the data, or the recipe does not serve.
    """
    if started() > 1:
        raise AnybatchError("a dry run is one process's: start it without torchrun")
    machine.check_device(config.device)
    if config.device == "cpu":
        torch.set_num_threads(1)  # as the run would
    read = None if recipe is None else read_recipe(recipe)
    processes, images, classes = (read.processes, read.images, read.classes) if read else (1, None, None)
    task = open_dry(config, images, classes)
    schedule = Schedule.of(config, task.train_count, processes)
    for line in task.notes:
        console.print(f"[yellow]Note:[/] {escape(line)}", soft_wrap=True)
    memory = _Memory(config.device)
    model = task.build()
    console.print(escape(f"Model: {_described(model, config)}; {run_name(config)}"), soft_wrap=True)
    if task.conversion:
        console.print(escape(task.conversion), soft_wrap=True)
    failure, seconds = _two_steps(task, model, schedule)
    if failure:
        console.print(f"[red]Not finite:[/] {escape(failure)}", soft_wrap=True)
        return 1
    together = schedule.step // processes
    shares = f" of {schedule.micro_batches} x {config.batch}" if schedule.micro_batches > 1 else ""
    console.print(f"Loss and gradients are finite, on {together} {config.examples}{shares} a step.", soft_wrap=True)
    console.print(memory.report(), soft_wrap=True)
    for line in _estimate(config, schedule, seconds, processes):
        console.print(line, soft_wrap=True)
    if read is not None and read.published:
        console.print(_table(read.published))
    return 0


def _described(model: nn.Module, config: TrainConfig) -> str:
    parameters = list(model.parameters())
    count, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    name = f"{type(model).__name__} ({config.record()['network']})"
    return f"{name}, {count:,} parameters, {trained:,} of them trained"


def _two_steps(task: Task[TrainConfig], model: nn.Module, schedule: Schedule) -> tuple[str, float]:
    """What was not finite, if anything, and the seconds of the second step: the first one also makes buffers."""
    config, seconds = task.config, 0.0
    optimizer = optimizer_of(model, config)
    for step in range(2):
        batches = [task.generated(config.batch) for _ in range(schedule.micro_batches)]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step * schedule.step)
        _wait(config.device)
        start = time.perf_counter()
        losses = take_step(task, model, optimizer, batches, ALONE)
        _wait(config.device)
        seconds = time.perf_counter() - start
        if not bool(torch.stack(losses).isfinite().all()):
            return f"the loss of step {step + 1}", seconds
        names = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if names:
            return f"the gradients of step {step + 1} in {', '.join(names[:3])}{', ...' if names[3:] else ''}", seconds
    return "", seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class _Memory:
    """The peak from here on: of the accelerator's allocations, or of this process."""

    def __init__(self, device: str) -> None:
        self.device, self.before = device, _resident()
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)

    def report(self) -> str:
        if self.device.startswith("cuda"):
            allocated = torch.cuda.max_memory_allocated(self.device)
            return f"Peak memory: {allocated / GIB:.1f} GiB allocated on {self.device}"
        peak = _resident()
        if peak is None or self.before is None:
            return "Peak memory: this system does not say"
        return (
            f"Peak memory: {peak / GIB:.1f} GiB resident in this process, {self.before / GIB:.1f} GiB of it before the "
            f"model was built"
        )


def _resident() -> int | None:
    """The most bytes of memory that this process has held so far; None where that is not counted."""
    try:  # Linux: what getrusage says there may be the parent's, if that started this process by vfork
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _estimate(config: TrainConfig, schedule: Schedule, seconds: float, processes: int) -> list[str]:
    steps = schedule.epoch // schedule.step
    besides = "reading, evaluation and the exchange of gradients" if processes > 1 else "reading and evaluation"
    return [
        f"A step of {schedule.step} {config.examples} on {processes} process{'es' * (processes > 1)}: {seconds:.2f} s; "
        f"{steps:,} steps an epoch: {duration(seconds * steps)}; {config.epochs} epochs: "
        f"{duration(seconds * steps * config.epochs)}.",
        f"That is {config.device}'s time for the steps alone, as it is now: {besides} come on top.",
    ]


def _table(published: tuple[Published, ...]) -> Table:
    sources = "; ".join(dict.fromkeys(row.source for row in published))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), caption=escape(sources))
    table.caption_justify = "left"
    measures = list(dict.fromkeys(name for row in published for name in row.measures))
    table.add_column("Published")
    for name in measures:
        table.add_column(name, justify="right")
    table.add_column("Yours", justify="right")
    table.add_column("Options", overflow="fold")
    for row in published:
        numbers = [f"{row.measures[name]:g}" if name in row.measures else "" for name in measures]
        table.add_row(escape(row.norm), *numbers, "", escape(row.options))
    return table
