"""What stands where in a study's figure and tables: the panel, the line and the place along it of every estimate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from anybatch.lab.compare import expand
from anybatch.lab.statistics import Estimate
from anybatch.lab.studies.options import has_option, option_of, without_option
from anybatch.lab.studies.planning import Point, called, points, value_text
from anybatch.lab.studies.reading import Study, View
from anybatch.lab.summary import REFERENCE, Row, Summary, grouped, label, paired, summarise
from anybatch.lab.training import RunResult

__all__ = ["WITHOUT", "Cell", "Layout", "lay_out", "numeric", "summaries"]

WITHOUT = "–"  # the place of a method that has no such option


@dataclass(frozen=True)
class Cell:
    """One method at one batch size at one point.

    Attributes:
        panel: its name; "" if there is one panel for all.
        line: its name.
        method: as typed, without the option that is along the axis.
        x: the value along the axis, or `WITHOUT`.
        row: of its point's summary; None if no run is finished. Likewise `reference`.
        to_batchnorm: difference to BatchNorm at the same batch, paired by seed; None where there is none.
    """

    panel: str
    line: str
    method: str
    x: Any
    row: Row | None
    reference: Row | None
    to_batchnorm: Estimate | None


@dataclass(frozen=True)
class Layout:
    """All cells, in the order of the study."""

    cells: tuple[Cell, ...]

    @property
    def panels(self) -> list[str]:
        """The names of those with a finished run, in order; all while there is only the reference."""
        begun = dict.fromkeys(cell.panel for cell in self.cells if cell.row is not None)
        return list(begun or dict.fromkeys(cell.panel for cell in self.cells))

    @property
    def columns(self) -> list[Any]:
        """Places along the axis: numbers in ascending order, anything else in the study's."""
        found = list(dict.fromkeys(cell.x for cell in self.cells if cell.x != WITHOUT))
        return sorted(found) if numeric(found) else found

    def lines(self, panel: str) -> dict[str, dict[Any, Cell]]:
        """The cells of a panel by line and place."""
        found: dict[str, dict[Any, Cell]] = {}
        for cell in self.cells:
            if cell.panel == panel:
                found.setdefault(cell.line, {})[cell.x] = cell
        return found

    def references(self, panel: str) -> dict[Any, Row]:
        """The references of a panel by place; where they are one and the same, it is at every place."""
        return {c.x: c.reference for c in self.cells if c.panel == panel and c.reference is not None}


def numeric(values: Sequence[Any]) -> bool:
    """Whether all are numbers, and there are some."""
    return bool(values) and all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def summaries(study: Study, results: Iterable[RunResult]) -> list[tuple[Point, Summary]]:
    """The summary of every point that has a finished run."""
    results = list(results)
    device = results[0].config.device if results else "cpu"
    found = []
    for point in points(study, device):
        if own := [result for result in results if point.has(result.config)]:
            found.append((point, summarise(own, expand(point.base, study.methods))))
    return found


def lay_out(study: Study, results: Sequence[RunResult], view: View) -> Layout:
    """Cells of the finished `results`, which are all of one device."""
    cells = []
    for point, summary in summaries(study, results):
        groups = grouped(result for result in results if point.has(result.config))
        rows = {(row.method, row.batch): row for row in summary.rows}
        for method in expand(point.base, study.methods):
            for batch in study.batches:
                own, plain = groups.get((method, batch)), groups.get((REFERENCE, batch))
                cells.append(
                    Cell(
                        **_place(study, view, point, method, batch),
                        row=rows.get((method, batch)),
                        reference=summary.reference,
                        to_batchnorm=paired(own, plain) if own and plain and method != REFERENCE else None,
                    )
                )
    return Layout(tuple(cells))


def _place(study: Study, view: View, point: Point, method: str, batch: int) -> Mapping[str, Any]:
    """Panel, line and x of a cell, and the method as its line has it."""
    coordinates = {"batch": batch, **point.values}
    is_option = view.x not in coordinates
    x: Any = coordinates.get(view.x)
    if is_option:
        x = option_of(point.base, method, view.x) if has_option(point.base, method, view.x) else WITHOUT
        method = without_option(method, view.x)
    panel = label(method) if view.panels == "method" else ""
    if view.panels in coordinates:
        panel = f"{called(view.panels)} {value_text(coordinates[view.panels])}"
    shown = {view.x, view.panels}
    rest = [f"batch {batch}"] if "batch" not in shown and len(study.batches) > 1 else []
    name = [] if view.panels == "method" and rest else [label(method)]
    return {"panel": panel, "line": ", ".join([*name, *rest]), "method": method, "x": x}
