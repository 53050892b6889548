"""The command study: the project's own questions, each answered by one command; and rows of the answers, checked."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anybatch.cli.app import app
from anybatch.cli.options import Device, typed_in
from anybatch.errors import AnybatchError

PUBLISHED = Path("docs/results/studies")


@app.command()
def study(
    context: typer.Context,
    name: Annotated[
        Path | None,
        typer.Argument(
            help="Of a study, or a .toml file of your own; none lists them. With --check: a study, or the folder "
            f"of published ones, {PUBLISHED} if none is given.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs of all studies, pages and figures.")] = Path(
        "results/studies"
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one a core")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each.", show_default="the study's")] = None,
    device: Device = "cpu",
    publish: Annotated[
        Path | None, typer.Option(help="When all runs are done: write page, figure and runs into this folder, too.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run a sample of published rows anew; exit code 1 if one is off."),
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="With --check: rows to draw.")] = 3,
    seed: Annotated[int, typer.Option(help="With --check: of the draw.")] = 0,
    tolerance: Annotated[
        float,
        typer.Option(
            help="With --check: points a row may be off by where machine, versions or source are not the same; as many "
            "as its seeds lie apart if that is more. Where all are the same: 0."
        ),
    ] = 3.0,  # rounding alone moves a run by a point or so, at worst by three: docs/results/f6k.md
    longest: Annotated[
        float | None,
        typer.Option(min=0, help="With --check: leave out runs that took longer, in seconds.", show_default="any"),
    ] = None,
) -> None:
    """Answer a question by all the runs it takes: a page with a figure and tables. Without a name: list the studies.

    Finished runs are kept, and those that studies share are done once: the same command goes on where it was stopped.
    """
    from anybatch.lab.studies import show
    from anybatch.lab.studies.reading import shipped

    typed = typed_in(context)
    console = Console(highlight=False)
    if check:
        _refuse(typed & {"out", "seeds", "device", "publish"}, "goes without --check")
        one = name is not None and not name.exists() and str(name) in shipped()
        folder, which = (PUBLISHED, str(name)) if one else (name or PUBLISHED, "*")
        raise typer.Exit(show.check(folder, which, rows, seed, tolerance, longest, jobs, console))
    _refuse(typed & {"rows", "seed", "tolerance", "longest"}, "goes with --check")
    if name is None:
        _refuse(typed, "goes with the name of a study; 'anybatch study' lists them")
        show.list_studies(console)
        return
    command = shlex.join(["anybatch", *sys.argv[1:]])
    raise typer.Exit(show.run_study(name, out, jobs, seeds, device, publish, command, console))


def _refuse(options: set[str], what: str) -> None:
    if options:
        raise AnybatchError(f"--{min(options)} {what}")
