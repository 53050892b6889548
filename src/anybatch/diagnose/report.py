"""report.html and diagnosis.json: a diagnosis as a page that stands on its own, and as numbers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AnybatchError
from ..reporting.files import write_atomically
from ..reporting.page import figure_element, render
from .experiments import EXPERIMENTS
from .figures import draw
from .findings import GIVEN

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

__all__ = ["NUMBERS", "REPORT", "make_folder", "write"]

_REM_PER_INCH = 4.95  # two panels side by side fill the page
REPORT, NUMBERS = "report.html", "diagnosis.json"


def write(diagnosis: "Diagnosis", folder: Path, command: str = "") -> Path:
    """Write both files; each is whole or not there.

    Raises:
        AnybatchError: they cannot be written.
    """
    sections = [
        {
            "row": row,
            "said": diagnosis.said(name),
            "figures": [
                figure_element(draw([panel]), prefix=f"{name}-{place}-", scale=_REM_PER_INCH)
                for place, panel in enumerate(row.module.panels(diagnosis.results[name]))
            ],
            "table": row.module.table(diagnosis.results[name][GIVEN]) if hasattr(row.module, "table") else None,
            "left_out": {key: why for key, why in diagnosis.left_out.items() if key.startswith(f"{name},")},
        }
        for name, row in EXPERIMENTS.items()
        if name in diagnosis.results
    ]
    missing = {key: why for key, why in diagnosis.left_out.items() if key.partition(", ")[0] not in diagnosis.results}
    page = render(
        "anybatch.diagnose",
        "diagnosis.html.j2",
        diagnosis=diagnosis,
        sections=sections,
        missing=missing,
        command=command,
    )
    numbers = json.dumps(diagnosis.numbers(), indent=1, allow_nan=False)
    make_folder(folder)
    try:
        write_atomically(folder / NUMBERS, (numbers + "\n").encode())
        write_atomically(folder / REPORT, page.encode())
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder / REPORT


def make_folder(folder: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        AnybatchError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> AnybatchError:
    why = error.strerror or error
    return AnybatchError(f"the diagnosis cannot be written to {folder} ({why}): mend it or name another folder")
