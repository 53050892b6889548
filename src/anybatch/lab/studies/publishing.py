"""A study's files: its page and figure, and, published, the runs that they are made of."""

import json
from collections.abc import Sequence
from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.lab.results import parse
from anybatch.lab.studies.figure import study_figure
from anybatch.lab.studies.page import page
from anybatch.lab.studies.reading import Study, read_study, shipped
from anybatch.lab.training import RunResult
from anybatch.reporting import style
from anybatch.reporting.files import write_atomically

__all__ = ["publish", "published_runs", "published_study", "write_page"]


def write_page(folder: Path, study: Study, results: Sequence[RunResult], seeds: int | None = None) -> Path:
    """Writes NAME.md, its figure and its runs, NAME.jsonl, of the finished ones, at least one; where the page is.

    Raises:
        AnybatchError: they cannot be written.
    """
    figure = study_figure(study, results)
    files = {
        "png": style.png(figure),
        "svg": style.svg(figure).encode(),
        "jsonl": "".join(f"{json.dumps(result.record(), allow_nan=False)}\n" for result in results).encode(),
        "md": page(study, results, seeds).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            write_atomically(folder / f"{study.name}.{suffix}", content)
    except OSError as error:
        raise AnybatchError(
            f"the study's page cannot be written to {folder} ({error.strerror or error}); the runs are safe: "
            f"make room, or name another folder, and give the same command again"
        ) from error
    return folder / f"{study.name}.md"


def publish(folder: Path, study: Study, results: Sequence[RunResult]) -> Path:
    """Writes the page and what goes with it into `folder`; a study of one's own goes along.

    Raises:
        AnybatchError: they cannot be written, or the name is taken by a study of the package, or there by one of
            another title.
    """
    if not study.shipped and study.name in shipped():
        raise AnybatchError(f"{study.path} has the name of a study in the package: rename it, then publish")
    there = folder / f"{study.name}.toml"
    if not study.shipped and there.is_file() and (title := read_study(there).title) != study.title:
        raise AnybatchError(
            f"{folder} has another study named {study.name}, '{title}': rename {study.path}, or publish into another "
            f"folder"
        )
    path = write_page(folder, study, results)
    try:
        if not study.shipped and study.path.resolve() != there.resolve():
            write_atomically(there, study.path.read_bytes())
    except OSError as error:
        raise AnybatchError(
            f"the study cannot be published in {folder} ({error.strerror or error}): allow writing there"
        ) from error
    return path


def published_runs(file: Path) -> list[RunResult]:
    """The runs of a published file, in its order.

    Raises:
        AnybatchError: it cannot be read, or a line of it is damaged.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise AnybatchError(f"{file} cannot be read ({error}): publish the study again") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parse(line))
        except (ValueError, KeyError, TypeError) as error:
            raise AnybatchError(f"line {number} of {file} is damaged ({error}): publish the study again") from error
    return found


def published_study(file: Path) -> Study:
    """The study of a published file: the one beside it, or the package's of that name.

    Raises:
        AnybatchError: there is none.
    """
    own = file.with_suffix(".toml")
    return read_study(own if own.exists() else Path(file.stem))
