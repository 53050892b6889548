"""What `anybatch bench` shows on a terminal and draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from anybatch.errors import AnybatchError
from anybatch.lab.bench.config import BenchConfig
from anybatch.lab.bench.figure import sweep_figure
from anybatch.lab.bench.records import Outcome, Timing, name_of, save
from anybatch.lab.bench.sweep import Sweep
from anybatch.lab.bench.timing import bench
from anybatch.reporting import style
from anybatch.reporting.files import write_atomically

__all__ = ["run"]


def run(config: BenchConfig, sweep: Sweep | None, folder: Path, command: str, console: Console) -> int:
    """Times the methods, once or over a sweep; saves the times; prints a table, and draws a sweep.

    Returns:
        The exit code: 0, or 1 if the steps of a method were wrong or none but the reference's could be timed.

    Raises:
        AnybatchError: the settings do not fit, or the times cannot be written.
    """
    outcomes = []
    with _progress(console) as progress:
        for outcome in sweep.run(config, progress) if sweep else [bench(config, progress)]:
            path = save(folder, outcome, command)
            outcomes.append(outcome)
    console.print(_over(sweep, outcomes) if sweep else _table(outcomes[0]))
    refused = {f"{name_of(t.row)}: {t.refused}": None for outcome in outcomes for t in outcome.timings if t.refused}
    for reason in refused:
        console.print(f"[red]Not timed:[/] {escape(reason)}", soft_wrap=True)
    console.print(f"{_settings(config, sweep)} Times: [bold]{escape(str(path))}[/]", soft_wrap=True)
    if sweep:
        console.print(f"Figure: [bold]{escape(str(_draw(folder, sweep, outcomes)))}[/]", soft_wrap=True)
    console.print(f"To repeat: {escape(command)}", soft_wrap=True)
    timings = [timing for outcome in outcomes for timing in outcome.timings[1:]]
    nothing = bool(timings) and all(timing.refused for timing in timings)
    return 1 if nothing or any(timing.failed for timing in timings) else 0


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing in a log."""
    columns = TextColumn("steps"), BarColumn(bar_width=None), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _table(outcome: Outcome) -> Table:
    what = {"step": "Step", "layer": "Layer", "inference": "Forward"}[outcome.config.what]
    columns = what, "25–75 %", "ms", "Peak", "History", "MB moved", "Bandwidth"
    table = _empty(columns)
    for timing in outcome.timings:
        if timing.refused or timing.traffic is None:
            continue
        low, middle, high = timing.quartiles
        traffic, memory, share = timing.traffic, outcome.memory(timing), outcome.share(timing)
        table.add_row(
            escape(name_of(timing.row)),
            f"{middle:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{timing.milliseconds:.1f}",
            "–" if memory is None else f"{memory:.2f}",
            f"{traffic.history / traffic.weights:.2f}",
            "–" if traffic.moved is None else f"{traffic.moved / 1e6:.0f}",
            "–" if share is None else f"{share:.0%}",
        )
    return table


def _over(sweep: Sweep, outcomes: Sequence[Outcome]) -> Table:
    """Medians of the ratios, a column a value."""
    table = _empty([f"{sweep.name} {value}" for value in sweep.values])
    for timings in zip(*(outcome.timings for outcome in outcomes), strict=True):
        table.add_row(escape(name_of(timings[0].row)), *map(_ratio, timings))
    return table


def _ratio(timing: Timing) -> str:
    if timing.refused:
        return "–"
    low, middle, high = timing.quartiles
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _empty(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("Method")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _settings(config: BenchConfig, sweep: Sweep | None) -> str:
    """The settings in a sentence, and what the columns mean in another."""
    swept = sweep.name if sweep else ""
    what = f"a 3x3 convolution and its norm, {config.channels} channels" if config.what == "layer" else config.network
    parts = [
        f"Medians over {config.rounds} rounds, of BatchNorm's; {what}",
        *([f"batch {config.batch}"] if swept != "batch" else []),
        *([f"{config.image_size} pixels"] if swept != "image-size" else []),
        f"{config.device}, {config.threads} thread{'s' if config.threads > 1 else ''}",
        f"{config.dtype}, {config.format}.",
    ]
    columns = (
        "In brackets 25 % to 75 %."
        if sweep
        else "Time and peak memory in BatchNorm's; history in units of the model's weights; MB moved as operators read "
        "and write, and the share of this machine's copy bandwidth that makes."
    )
    return f"{', '.join(parts)} {columns}"


def _draw(folder: Path, sweep: Sweep, outcomes: Sequence[Outcome]) -> Path:
    figure = sweep_figure(sweep, outcomes)
    path = folder / f"{sweep.name}.png"
    try:
        write_atomically(path, style.png(figure))
        write_atomically(path.with_suffix(".svg"), style.svg(figure).encode())
    except OSError as error:
        raise AnybatchError(f"cannot write {path} ({error.strerror or error}): mend it or give --out") from error
    return path
