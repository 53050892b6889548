"""The tables of the results pages are those of the runs beside them."""

from pathlib import Path

import pytest
from scripts.make_results_table import tables

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FILES = sorted([*RESULTS.glob("detect/*.jsonl"), *RESULTS.glob("segment/*.jsonl")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RESULTS)))
def test_tables_are_the_runs(file: Path) -> None:
    page = (RESULTS / f"{file.parent.name}.md").read_text()
    assert tables(file) in page


def test_there_are_runs() -> None:
    assert {file.parent.name for file in FILES} == {"detect", "segment"}
