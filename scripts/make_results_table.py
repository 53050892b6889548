"""The tables of a results page, from the runs beside it: what a method scores at each batch size, and by how much less.

python scripts/make_results_table.py docs/results/detect/runs.jsonl
"""

import sys
from pathlib import Path

from anybatch.lab.report import difference_text, estimate_text
from anybatch.lab.results import parse
from anybatch.lab.summary import Row, Summary, summarise


def tables(file: Path) -> str:
    """Two tables in Markdown: scores, and differences to the reference of the same seed."""
    results = [parse(line) for line in file.read_text().splitlines() if line]
    summary = summarise(results, list(dict.fromkeys(result.config.method for result in results)))
    rows = {(row.method, row.batch): row for row in summary.rows}
    reference = summary.reference
    assert reference is not None
    first = f"{estimate_text(reference.accuracy)} is the reference, {reference.label} at batch {reference.batch}"
    scores = _table(summary, rows, f"{summary.measure}, %", lambda row: estimate_text(row.accuracy))
    differences = _table(summary, rows, "difference, points", lambda row: difference_text(row.difference))
    seeds = f"{reference.runs} seed{'s' * (reference.runs != 1)}"
    return f"{first} ({seeds}).\n\n{scores}\n{differences}"


def _table(summary: Summary, rows: dict[tuple[str, int], Row], head: str, cell) -> str:  # type: ignore[no-untyped-def]
    batches = sorted({row.batch for row in summary.rows if not row.is_reference})
    lines = [
        f"| {head} | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for method in summary.methods:
        there = [rows.get((method, batch)) for batch in batches]
        label = next(row.label for row in there if row is not None)
        cells = ["–" if row is None or row.accuracy is None else cell(row) for row in there]
        cells = [
            text + (f" ({row.diverged} of {row.runs} diverged)" if row and row.diverged else "")
            for text, row in zip(cells, there, strict=True)
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))
