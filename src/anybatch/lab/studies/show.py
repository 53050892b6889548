"""What `anybatch study` shows on a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.compare import compare
from anybatch.lab.config import TrainConfig
from anybatch.lab.display import Display
from anybatch.lab.studies import checking
from anybatch.lab.studies.planning import check_data, namer, runs, seconds
from anybatch.lab.studies.publishing import publish, write_page
from anybatch.lab.studies.reading import read_study, shipped
from anybatch.lab.terminal import ending
from anybatch.lab.training import RunResult
from anybatch.lab.workers import jobs_for
from anybatch.reporting.page import duration

__all__ = ["check", "list_studies", "run_study"]


def list_studies(console: Console) -> None:
    """Prints the studies of the package: name, question, runs, about how long."""
    cores = machine.cores()
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("Study")
    table.add_column("Question")
    table.add_column("Runs", justify="right")
    table.add_column(f"On {cores} core{'s' * (cores != 1)}", justify="right")
    for name, path in shipped().items():
        study = read_study(path)
        time = seconds(study)
        about = "–" if time is None else f"about {duration(_rounded(time / cores))}"
        table.add_row(f"[bold]{name}[/]", escape(study.question), str(len(runs(study))), about)
    console.print(table)
    console.print(
        "\n[dim]anybatch study NAME runs one; those of one folder share their runs. The times are rough, and of a CPU."
        " --seeds 2 gives a first look.[/]"
    )


def run_study(
    name: Path,
    folder: Path,
    jobs: int | None,
    seeds: int | None,
    device: str,
    published: Path | None,
    command: str,
    console: Console,
) -> int:
    """Runs what of a study is not yet done, writes its page and figure, and publishes it if that is asked for.

    Args:
        name: of a study of the package, or a file.
        folder: of the runs of all studies.
        jobs: runs at a time; None: one a core, on a GPU one.
        seeds: of each run; None as the study says.
        device: to run on.
        published: folder to publish in.
        command: what was typed.
        console: to print on.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if interrupted.

    Raises:
        AnybatchError: the study does not fit, its data are not there, or something cannot be written.
    """
    study = read_study(name)
    check_data(study)
    if published is not None and seeds not in (None, study.seeds):
        raise AnybatchError(
            f"--publish takes the {study.seeds} seeds that {study.path.name} says: leave out --seeds {seeds}"
        )
    configs = runs(study, seeds, device)
    jobs = jobs or jobs_for(device)
    console.print(f"[bold]{escape(study.title)}.[/] {escape(study.question)}", soft_wrap=True)
    outcome = compare(configs, folder, jobs, Display(console, jobs, namer(study.vary)))
    if outcome.results:
        page = write_page(folder, study, outcome.results, seeds or study.seeds)
        console.print(f"Page: [bold]{escape(str(page))}[/]", soft_wrap=True)
    not_yet = "" if published is None else "; a study is published when it is whole"
    if code := ending(outcome, len(configs), folder, command, console, not_yet):
        return code
    if published is not None:
        console.print(f"Published: [bold]{escape(str(publish(published, study, outcome.results)))}[/]", soft_wrap=True)
    return 0


def check(
    folder: Path,
    study: str,
    rows: int,
    seed: int,
    tolerance: float,
    longest: float | None,
    jobs: int | None,
    console: Console,
) -> int:
    """Runs a sample of published rows anew and prints both beside each other.

    Args:
        folder: of published studies.
        study: whose rows; "*": of all.
        rows: to draw.
        seed: of the draw.
        tolerance: points that a row may be off by where machine, versions or source are not the same.
        longest: seconds that a run may have taken; None: any.
        jobs: at a time; None: one a core, on a GPU one.
        console: to print on.

    Returns:
        The exit code: 0, or 1 if a row is off.

    Raises:
        AnybatchError: there is nothing to check, or a published line is damaged.
    """
    if tolerance < 0:
        raise AnybatchError(f"--tolerance is {tolerance:g}: give at least 0 points")
    sample = checking.draw(folder, rows, seed, longest, study)
    console.print(f"{len(sample.runs)} of {sample.published} published runs, drawn with seed {seed}", soft_wrap=True)
    if sample.longer:
        console.print(f"Left out: {sample.longer} that took longer than {longest:g} s")
    if sample.elsewhere:
        console.print(f"Left out: {sample.elsewhere} on a device that is not here")
    names = {each.run.config: each.name for each in sample.runs}
    total, ended = len(names), 0

    def tell(config: TrainConfig) -> None:
        nonlocal ended
        ended += 1
        console.print(rf"\[{ended}/{total}] {escape(names[config])} has ended", soft_wrap=True)

    device = next((config.device for config in names if config.device != "cpu"), "cpu")
    checked = checking.check(sample, jobs or jobs_for(device), tolerance, tell)
    console.print(_checked(checked))
    wrong = [each for each in checked if each.wrong]
    for each in wrong:
        console.print(f"[red]Off:[/] {escape(each.published.name)}: {escape(each.wrong)}", soft_wrap=True)
    console.print(f"{len(checked) - len(wrong)} of {len(checked)} rows are as published", soft_wrap=True)
    return 1 if wrong else 0


def _checked(checked: Sequence[checking.Checked]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("Study", overflow="fold")
    table.add_column("Run", overflow="fold")
    for column, width in {"Published": 9, "Again": 8, "Difference, and allowed": 10}.items():
        table.add_column(column, justify="right", min_width=width)
    table.add_column("Not the same")
    table.add_column("Verdict", no_wrap=True)
    for each in checked:
        difference = each.difference
        table.add_row(
            escape(each.published.study),
            escape(each.published.name),
            _score(each.published.run),
            "–" if each.again is None else _score(each.again),
            "–" if difference is None else f"{difference:+.4f} ({each.allowed:.3g})",
            ", ".join(each.differs) or "–",
            "[red]off[/]" if each.wrong else "as published",
        )
    return table


def _score(run: RunResult) -> str:
    return "diverged" if run.accuracy is None else f"{run.accuracy:.4f}"


def _rounded(time: float) -> float:
    """To a minute, from an hour on to half an hour."""
    step = 60 if time < 3600 else 1800
    return max(step, round(time / step) * step)
