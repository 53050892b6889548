"""A comparison while it runs: bars on a terminal, plain lines in a log."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from anybatch.lab.config import TrainConfig
from anybatch.lab.summary import label
from anybatch.lab.training import Progress as RunProgress
from anybatch.lab.training import RunResult
from anybatch.reporting.page import duration

__all__ = ["Display", "run_name"]


def run_name(config: TrainConfig) -> str:
    """A run in a few words."""
    return f"{label(config.method)} at batch {config.batch}, seed {config.seed}"


class Display:
    """Shows a bar a running run and the time left for the whole; without a terminal, a line an event.

    Args:
        console: to print on.
        jobs: runs at a time.
        name: what a run is called.
    """

    def __init__(self, console: Console, jobs: int, name: Callable[[TrainConfig], str] = run_name) -> None:
        self.console = console
        self.jobs = jobs
        self._name = name
        self._live = console.is_terminal
        self._bars: dict[TrainConfig, TaskID] = {}
        self._share: dict[TrainConfig, float] = {}  # of each run, what is done: 0 to 1
        self._ended = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}", justify="right"),
            console=console,
            expand=True,
        )

    @contextmanager
    def showing(
        self, total: Mapping[TrainConfig, int], costs: Mapping[TrainConfig, float], reused: int
    ) -> Iterator[None]:
        """For the time of the comparison: images of every run to come, what it costs, and how many runs are done."""
        self._total, self._costs = total, costs
        self._share = dict.fromkeys(total, 0.0)
        self._started = time.monotonic()
        there = f", {reused} already done" if reused else ""
        self.console.print(f"{len(total)} runs to do{there}; {self.jobs} at a time")
        if not total:
            yield
            return
        self._whole = self._progress.add_task("[bold]all runs", total=sum(costs.values()), note="")
        if not self._live:
            yield
            return
        with self._progress:
            yield

    def warn(self, text: str) -> None:
        """A line that should not be missed."""
        self.console.print(f"[yellow]Warning:[/] {escape(text)}", soft_wrap=True)

    def start(self, config: TrainConfig) -> None:
        """A run begins."""
        if self._live:
            description = escape(self._name(config))
            self._bars[config] = self._progress.add_task(description, total=self._total[config], note="starts")

    def advance(self, config: TrainConfig, progress: RunProgress) -> None:
        """A run has come further."""
        self._share[config] = progress.images / progress.total
        if self._live:
            note = f"{progress.images:,} of {progress.total:,} {config.examples}"
            self._progress.update(self._bars[config], completed=progress.images, note=note)
            self._update_whole()

    def finish(self, config: TrainConfig, result: RunResult) -> None:
        """A run is done and saved."""
        outcome = "diverged" if result.accuracy is None else f"{result.accuracy:5.2f} %"
        self._end(config, f"{escape(self._name(config)):<52} {outcome}  ({duration(result.seconds)})")

    def fail(self, config: TrainConfig, reason: str) -> None:
        """A run ended with an error."""
        self._end(config, f"[red]Failed:[/] {escape(self._name(config))}: {escape(reason)}")

    def _end(self, config: TrainConfig, line: str) -> None:
        self._share[config] = 1.0
        self._ended += 1
        if self._live:
            self._progress.remove_task(self._bars.pop(config))
            self._update_whole()
            self.console.print(line, soft_wrap=True)
        else:
            self.console.print(rf"\[{self._ended}/{len(self._share)}] {line}{self._left()}", soft_wrap=True)

    def _update_whole(self) -> None:
        done = sum(self._costs[config] * share for config, share in self._share.items())
        self._progress.update(self._whole, completed=done, note=self._left().lstrip("; "))

    def _left(self) -> str:
        done = sum(self._costs[config] * share for config, share in self._share.items())
        left = sum(self._costs.values()) - done
        elapsed = time.monotonic() - self._started
        # The first seconds are start-up and say nothing about the rest.
        if left <= 0 or done <= 0 or elapsed < 5:
            return ""
        return f"; about {duration(elapsed * left / done)} left"
