"""The page of a single run: what it scored, how it learnt, what it does, and how to do it again."""

from collections.abc import Mapping
from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.lab import pictures
from anybatch.lab.plots import run_figure
from anybatch.lab.report import REPORT, facts_of, shared_configuration
from anybatch.lab.summary import headed, label
from anybatch.lab.training import RunResult
from anybatch.reporting.files import write_atomically
from anybatch.reporting.page import figure_element, render

__all__ = ["write_run_report"]


def write_run_report(folder: Path, result: RunResult, shown: Mapping[str, Path], conversion: str, command: str) -> Path:
    """Writes report.html into `folder`.

    Args:
        folder: must exist.
        result: of the run.
        shown: pictures by their captions.
        conversion: what was done to every norm.
        command: what was typed.

    Raises:
        AnybatchError: it cannot be written.
    """
    page = render(
        "anybatch.lab",
        "run.html.j2",
        result=result,
        label=label(result.config.method),
        measure=result.config.measure,
        headed=headed(result.config.measure),
        figure=figure_element(run_figure(result), "r-"),
        pictures=[pictures.element(path, caption) for caption, path in shown.items()],
        conversion=conversion,
        configuration=shared_configuration([result]),
        facts=facts_of([result]),
        command=command,
    )
    try:
        write_atomically(folder / REPORT, page.encode())
    except OSError as error:
        raise AnybatchError(
            f"the report cannot be written to {folder} ({error.strerror or error}); the trained model is safe there: "
            f"make room, then give the same command again with --resume"
        ) from error
    return folder / REPORT
