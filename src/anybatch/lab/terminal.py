"""What `anybatch compare` and `anybatch train` show on a terminal, around the work itself."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from anybatch.lab import compare as comparison
from anybatch.lab import weighing
from anybatch.lab.board import board
from anybatch.lab.config import TrainConfig
from anybatch.lab.display import Display, run_name
from anybatch.lab.interruption import Interruption
from anybatch.lab.pictures import save
from anybatch.lab.processes import joined
from anybatch.lab.report import PICTURES, difference_text, estimate_text, write_report
from anybatch.lab.run_report import write_run_report
from anybatch.lab.summary import Summary, headed, summarise
from anybatch.lab.tasks import open_task
from anybatch.lab.training import Progress, RunResult, Stopped, train_run
from anybatch.lab.workers import jobs_for

__all__ = ["compare", "ending", "train", "weigh"]


def compare(configs: Sequence[TrainConfig], folder: Path, jobs: int | None, command: str, console: Console) -> int:
    """Compares, writes the report, prints the table.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if interrupted.

    Raises:
        AnybatchError: a configuration does not fit, or the results cannot be written.
    """
    if jobs is None:
        jobs = jobs_for(configs[0].device)
    outcome = comparison.compare(configs, folder, jobs, Display(console, jobs))
    missing = _missing(configs, outcome)
    if outcome.results:
        summary = summarise(outcome.results, list(dict.fromkeys(config.method for config in configs)))
        report = write_report(folder, summary, outcome.results, command, missing)
        console.print()
        console.print(_table(summary))
        for sentence in summary.conclusions:
            console.print(escape(sentence))
        console.print(f"\nReport: [bold]{escape(str(report))}[/]", soft_wrap=True)
    return ending(outcome, len(configs), folder, command, console)


def ending(
    outcome: comparison.Outcome, planned: int, folder: Path, command: str, console: Console, more: str = ""
) -> int:
    """Says what is missing of the planned runs, and how to go on.

    Args:
        outcome: of them.
        planned: how many there are.
        folder: where the finished ones are.
        command: what was typed.
        console: to print on.
        more: what follows from their missing.

    Returns:
        The exit code: 0 if none is, 1 if a run failed, 130 if interrupted.
    """
    if outcome.interrupted:
        done = f"{len(outcome.results)} of {planned} runs are finished and safe in {folder}"
        console.print(f"[yellow]Interrupted.[/] {escape(done)}{more}. To go on: {escape(command)}", soft_wrap=True)
        return 130
    if outcome.failures:
        failed = f"{len(outcome.failures)} of {planned} runs failed; the same command tries them again{more}"
        console.print(f"[red]{failed}.[/]", soft_wrap=True)
        return 1
    return 0


def train(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    save_every: int | None,
    arguments: Sequence[str],
    console: Console,
    watched: bool = False,
) -> int:
    """Trains one configuration with a checkpoint folder, and prints what came of it.

    Args:
        config: what to train.
        folder: for the checkpoints.
        resume: go on from there.
        save_every: steps after which to save besides after every epoch.
        arguments: of the command line, to name the one that goes on.
        console: to print on, in the main one of several processes.
        watched: tell TensorBoard how it goes, and write a page with pictures at the end.

    Returns:
        The exit code: 0, or 128 and the number of the signal that stopped the run.

    Raises:
        AnybatchError: the configuration does not fit, or the checkpoint cannot be read or written.
    """
    if config.device == "cpu":
        torch.set_num_threads(1)  # as in a comparison: the same numbers
    task = open_task(config)
    with joined(config.device) as processes:
        main = processes.is_main
        if not main:
            console = Console(quiet=True)
        for line in task.notes:
            console.print(f"[yellow]Warning:[/] {escape(line)}", soft_wrap=True)
        shown: dict[str, Path] = {}
        with (
            Interruption() as interruption,
            board(folder if watched and main else None, config.task) as watch,
            _progress(console, run_name(config)) as show,
        ):
            try:
                result = train_run(
                    task,
                    show,
                    checkpoint=folder,
                    resume=resume,
                    save_every=save_every,
                    stop=interruption.came,
                    say=lambda line: console.print(f"[yellow]Note:[/] {escape(line)}", soft_wrap=True),
                    processes=processes,
                    watch=watch,
                    finish=lambda model: shown.update(save(task, model, folder / PICTURES) if watched else {}),
                )
            except Stopped as stopped:
                command = _resuming(arguments, processes.count)
                console.print(
                    f"[yellow]Stopped[/] after {stopped.done.images:,} {config.examples}, all saved in "
                    f"{escape(str(folder))}. To go on: {escape(command)}",
                    soft_wrap=True,
                )
                return interruption.exit_code
    if main:
        _print_result(result, folder, console)
    if main and watched:
        report = write_run_report(
            folder,
            result,
            shown,
            task.conversion,
            shlex.join(["anybatch", *(each for each in arguments if each != "--resume")]),
        )
        console.print(f"Report: [bold]{escape(str(report))}[/]", soft_wrap=True)
    return 0


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, nothing in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[note]}"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(name), total=None, note="")

        def show(progress: Progress) -> None:
            note = "" if progress.accuracy is None else f"{progress.accuracy:.2f} % after the last epoch"
            bar.update(task, completed=progress.images, total=progress.total, note=note)

        yield show


def _resuming(arguments: Sequence[str], processes: int) -> str:
    """The command that goes on where this one stopped."""
    start = ["anybatch"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}", "-m", "anybatch"]
    return shlex.join([*start, *arguments, *([] if "--resume" in arguments else ["--resume"])])


def _print_result(result: RunResult, folder: Path, console: Console) -> None:
    measure, name = result.config.measure, result.config.examples
    for point in result.curve:
        console.print(f"epoch {point['epoch']}: {point['accuracy']:.2f} % {measure}")
    if result.accuracy is None:
        console.print("[red]Diverged:[/] a loss was not finite. Try a smaller --lr.")
    else:
        train = "" if result.train_accuracy is None else f" ({result.train_accuracy:.2f} % on the training {name})"
        console.print(
            f"{run_name(result.config)}: [bold]{result.accuracy:.2f} %[/] {measure}{train} in {result.seconds:.0f} s",
            soft_wrap=True,
        )
        if result.more:
            console.print(", ".join(f"{each} {value:.2f}" for each, value in result.more.items()), soft_wrap=True)
        console.print(f"Checkpoint: [bold]{escape(str(folder))}[/]", soft_wrap=True)


def weigh(folder: Path, console: Console) -> None:
    """Tunes example weighing for a checkpoint, and prints accuracy against alpha.

    Raises:
        AnybatchError: the checkpoint cannot be read or weighed.
    """
    found = weighing.weigh(folder)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("alpha", "Validation, %", "Test, %"):
        table.add_column(column, justify="right")
    for alpha, accuracy in found.validation.items():
        row = f"{alpha:.1f}", f"{accuracy:.2f}", f"{found.test[alpha]:.2f}"
        table.add_row(*row, style="bold" if alpha == found.alpha else None)
    console.print(table)
    gain = found.test[found.alpha] - found.test[0.0]
    console.print(
        f"{run_name(found.config)}: alpha {found.alpha:.1f} is best on the first half of the test images; on the "
        f"second it changes accuracy by [bold]{gain:+.2f}[/] points to {found.test[found.alpha]:.2f} %",
        soft_wrap=True,
    )


def _missing(configs: Sequence[TrainConfig], outcome: "comparison.Outcome") -> list[str]:
    reasons = dict(outcome.failures)
    done = {result.config for result in outcome.results}
    return [
        f"{run_name(config)} ({reasons.get(config, 'interrupted')})"
        for config in configs
        if config not in done and (outcome.interrupted or config in reasons)
    ]


def _table(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("Method")
    trained = any(row.train_accuracy is not None for row in summary.rows)
    for column in ("Batch", headed(summary.measure), "Difference", *(["Train, %"] if trained else []), "Seconds"):
        table.add_column(column, justify="right")
    for row in summary.rows:
        diverged = f" ({row.diverged} of {row.runs} diverged)" if row.diverged else ""
        table.add_row(
            escape(row.label),
            str(row.batch),
            estimate_text(row.accuracy) + diverged,
            "reference" if row.is_reference else difference_text(row.difference),
            *(["–" if row.train_accuracy is None else f"{row.train_accuracy:.1f}"] if trained else []),
            f"{row.seconds:.0f}",
            style="bold" if row.is_reference else None,
        )
    return table
