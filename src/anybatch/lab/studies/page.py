"""A study as a page in Markdown: tables, and beneath them all that is needed to make every number of it again."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from anybatch.lab.report import difference_text, estimate_text, facts_of, shared_configuration
from anybatch.lab.studies.layout import WITHOUT, Cell, Layout, lay_out, summaries
from anybatch.lab.studies.planning import called, runs, value_text
from anybatch.lab.studies.reading import Study, View
from anybatch.lab.summary import REFERENCE, Row
from anybatch.lab.training import RunResult

__all__ = ["command_of", "page"]

DIGITS = 2  # of differences, in points
ABSENT = {"examples_per_group": "batch as one"}  # the head of a column of methods without such an option


def page(study: Study, results: Sequence[RunResult], seeds: int | None = None) -> str:
    """The page of the finished runs, at least one; the same runs give the same page.

    Args:
        study: of which.
        results: of its runs, all of one device.
        seeds: that were asked for; None takes those that there are.
    """
    device = results[0].config.device
    seeds = seeds or 1 + max(result.config.seed for result in results)
    command = command_of(study, seeds, device)
    planned = len(runs(study, seeds, device))
    missing = "" if len(results) == planned else f" **{len(results)} of {planned} runs are finished.**"
    measure = study.base.measure
    parts = [
        f"# {study.title}",
        f"{study.question}{missing}",
        *([study.note] if study.note else []),
        f"![{study.title}]({study.name}.png)",
        *_conclusions(study, results),
        f"Means ± half the width of the 95 % t interval over {seeds} seed{'s' * (seeds != 1)}; differences are paired "
        f"by seed, in points. The reference of each is BatchNorm at the gradient batch with everything else the same.",
        *_tables(study, results, seeds),
        "## How it was measured",
        f"```sh\n{command}\n```",
        f"{study.base.examples.capitalize()} and schedule: {_configuration(results)}. "
        f"{measure.capitalize()} is taken once, after the last epoch. "
        f"The runs, one JSON line each with all that is said here: [{study.name}.jsonl]({study.name}.jsonl).",
        _facts(results),
        "What the methods are:",
        "\n".join(_norms(results)),
    ]
    return "\n\n".join(parts) + "\n"


def command_of(study: Study, seeds: int, device: str, *more: str) -> str:
    """What to type to make the page again."""
    which = study.name if study.shipped else f"{study.name}.toml"
    words = ["anybatch", "study", which, *(["--seeds", str(seeds)] if seeds != study.seeds else [])]
    return shlex.join([*words, *(["--device", device] if device != "cpu" else []), *more])


def _conclusions(study: Study, results: Sequence[RunResult]) -> list[str]:
    found = summaries(study, results)
    if len(found) == 1:
        return [" ".join(found[0][1].conclusions)]
    return ["\n".join(f"- {point.text}: {' '.join(summary.conclusions)}" for point, summary in found)]


def _tables(study: Study, results: Sequence[RunResult], seeds: int) -> list[str]:
    view = study.view
    if view.panels == "method":  # a panel each, but one table
        view = View(x=view.x)
    layout = lay_out(study, results, view)
    parts = []
    for panel in layout.panels:
        parts += [f"## {panel[:1].upper()}{panel[1:]}"] if panel else []
        references = layout.references(panel)
        alone = len(set(references.values())) == 1
        if alone:
            (row,) = set(references.values())
            parts.append(f"Reference: {_reference(row)}, {_score(row, seeds, ' %')}.")
        head = f"{study.base.measure}, %"
        above = [] if alone else [("**reference**", {x: _score(row, seeds) for x, row in references.items()})]
        parts.append(_table(head, layout, panel, view, lambda cell: _score(cell.row, seeds), above))
        parts.append(_table("difference to the reference", layout, panel, view, _difference))
        plain = [cell for cell in layout.cells if cell.method == REFERENCE and cell.row is not None]
        if any(cell.row is not None and not cell.row.is_reference for cell in plain) and len(plain) < len(layout.cells):
            table = _table("difference to BatchNorm at the same batch", layout, panel, view, _to_batchnorm)
            parts.append(table)
    return parts


def _table(
    head: str,
    layout: Layout,
    panel: str,
    view: View,
    text: Callable[[Cell], str],
    above: Sequence[tuple[str, dict[Any, str]]] = (),
) -> str:
    """A line each, a place along the axis a column; `above` are rows that come first."""
    columns = [*([WITHOUT] if any(cell.x == WITHOUT for cell in layout.cells) else []), *layout.columns]
    rows = [*above]
    for line, cells in layout.lines(panel).items():
        texts = {x: text(cell) for x, cell in cells.items()}
        if any(texts.values()):
            rows.append((line, texts))
    absent = ABSENT.get(view.x, f"without {called(view.x)}")
    heads = [absent if x == WITHOUT else f"{called(view.x)} {value_text(x)}" for x in columns]
    lines = [f"| {head} | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(texts.get(x) or '–' for x in columns)} |" for name, texts in rows]
    return "\n".join(lines)


def _score(row: Row | None, seeds: int, unit: str = "") -> str:
    if row is None:
        return "–"
    diverged = f" ({row.diverged} of {row.runs} diverged)" if row.diverged else ""
    fewer = f" ({row.runs} seed{'s' * (row.runs != 1)})" if row.runs != seeds else ""
    return estimate_text(row.accuracy) + unit + diverged + fewer


def _difference(cell: Cell) -> str:
    if cell.row is None:
        return "–"
    return "reference" if cell.row.is_reference else difference_text(cell.row.difference, DIGITS)


def _to_batchnorm(cell: Cell) -> str:
    return "" if cell.method == REFERENCE else difference_text(cell.to_batchnorm, DIGITS)


def _reference(row: Row) -> str:
    return f"{row.label} at batch {row.batch}"


def _configuration(results: Sequence[RunResult]) -> str:
    return ", ".join(f"{name} {value_text(value)}" for name, value in shared_configuration(results).items())


def _facts(results: Sequence[RunResult]) -> str:
    """What the runs were made with, a line each: seeds, machines, versions, commits, dates."""
    seeds = sorted({result.config.seed for result in results})
    dates = sorted(str(result.facts["date"])[:10] for result in results if result.facts.get("date"))
    commits = Counter(str(result.facts.get("commit") or "not recorded") for result in results)
    rows = [
        ("seeds", ", ".join(map(str, seeds))),
        ("runs", str(len(results))),
        *((name, value) for name, value in facts_of(results) if name != "commit"),
        ("commit", ", ".join(f"{commit} ({count} runs)" for commit, count in commits.items())),
        ("dates", f"{dates[0]} to {dates[-1]}" if dates else "not recorded"),
        ("hours of computing", f"{sum(result.seconds for result in results) / 3600:.1f}"),
    ]
    return "\n".join(["| made with | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _norms(results: Sequence[RunResult]) -> list[str]:
    """What each method resolved to; several where a fraction of the run did."""
    norms: dict[str, dict[str, None]] = {}
    for result in results:
        norms.setdefault(result.config.method, {})[result.norm] = None
    return [f"- `{method}`: {', '.join(f'`{norm}`' for norm in found)}" for method, found in norms.items()]
