"""The tables of the results pages are those of the runs beside them, and what other pages quote is on these."""

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from scripts.make_results_table import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
FILES = sorted([*RESULTS.glob("detect/*.jsonl"), *RESULTS.glob("segment/*.jsonl")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RESULTS)))
def test_tables_are_the_runs(file: Path) -> None:
    page = (RESULTS / f"{file.parent.name}.md").read_text()
    assert tables(file) in page


def test_there_are_runs() -> None:
    assert {file.parent.name for file in FILES} == {"detect", "segment"}


NUMBER = re.compile(r"([+−]?)(\d+\.\d+) ± (\d+\.\d+)(?! paired)")  # methods among themselves: no page has these
LINK = re.compile(r"\((?:\.\./|docs/)*results/([\w/-]+\.md)")


def statements(text: str) -> Iterator[str]:
    """Rows of tables, items of lists and paragraphs."""
    for block in re.split(r"\n\s*\n", text):
        yield from re.split(r"\n(?=[|-])", block)


# What leads to pages of results has its numbers from one of these.
QUOTING = [
    (page, statement, links)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if RESULTS not in page.parents
    for statement in statements(page.read_text())
    if NUMBER.search(statement) and (links := tuple(dict.fromkeys(LINK.findall(statement))))
]


@pytest.mark.parametrize(
    ("page", "statement", "links"),
    QUOTING,
    ids=[f"{page.stem}: {statement[:50].strip('| ')}" for page, statement, _ in QUOTING],
)
def test_a_number_is_on_a_page_it_leads_to(page: Path, statement: str, links: tuple[str, ...]) -> None:
    there = [each for link in links for each in NUMBER.findall((RESULTS / link).read_text())]
    for sign, *quoted in NUMBER.findall(statement):
        near = Decimal(10) ** -len(quoted[0].partition(".")[2])
        same = [
            own
            for own, *exact in there
            if all(abs(Decimal(a) - Decimal(b)) <= near / 2 for a, b in zip(exact, quoted, strict=True))
        ]
        assert sign in same if sign else same, f"{page.name} has {sign}{' ± '.join(quoted)}, which is not in {links}"


def test_numbers_are_quoted() -> None:
    assert len(QUOTING) > 25
