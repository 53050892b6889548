"""A study's figure: means with their intervals, in one pair of axes or in a panel each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from anybatch.lab.panels import COLUMNS, panels
from anybatch.lab.plots import DASHED, colours_of, draw_line, draw_reference, name_lines
from anybatch.lab.statistics import Estimate
from anybatch.lab.studies.layout import WITHOUT, Cell, Layout, lay_out, numeric
from anybatch.lab.studies.planning import called, value_text
from anybatch.lab.studies.reading import Study, View
from anybatch.lab.summary import REFERENCE, Row, headed
from anybatch.lab.training import RunResult
from anybatch.reporting.style import MARKERS, MUTED, SERIES, STYLE

__all__ = ["study_figure"]

WIDE_ENOUGH = 4  # largest over smallest place, from which the axis is logarithmic
AXES = {
    "batch": "images a layer sees at once",
    "examples_per_group": "images a group, which a layer sees at once",
    "burn_in_steps": "burn-in, share of the training forwards",
    "window": "window, batches",
}


def study_figure(study: Study, results: Sequence[RunResult]) -> Figure:
    """The figure of the finished runs, at least one; the reference is dashed."""
    view, layout = study.view, lay_out(study, results, study.view)
    axis = _Axis.of(layout, view)
    title = headed(study.base.measure) if view.y == "score" else "Difference to the reference, points"
    below = AXES.get(view.x, called(view.x))
    with mpl.rc_context(STYLE):
        styles = _styles(layout, by_panel=view.panels == "method")
        if len(layout.panels) == 1:
            figure = Figure(figsize=(7.2, 4.6), layout="constrained")
            axes = figure.add_subplot()
            ends = _draw(axes, layout, layout.panels[0], axis, view, styles)
            axes.set_xlabel(below)
            axes.set_title(title, loc="left", fontsize=12, color=MUTED)
            name_lines(axes, ends)
            return figure

        def draw(axes: Axes, place: int) -> None:
            _draw(axes, layout, layout.panels[place], axis, view, styles, grey=view.panels == "method")

        names = layout.panels
        if view.panels == "method" and all(len(layout.lines(name)) == 1 for name in names):
            grey = any(cell.method == REFERENCE for cell in layout.cells)
            note = "dashed: the reference; grey: BatchNorm" if grey else "dashed: the reference"
            inks = [next(styles[c.line, c.method][0] for c in layout.cells if c.panel == name) for name in names]
            return panels(names, inks, draw, f"{title} ({note})", below, MUTED)
        figure = panels(names, [MUTED] * len(names), draw, f"{title} (dashed: the reference)", "", MUTED, height=3.4)
        for axes in figure.axes[max(0, len(names) - COLUMNS) : len(names)]:  # one label for all would lie on the names
            axes.set_xlabel(below, fontsize=10)
        drawn = {
            cell.line: styles[cell.line, cell.method]
            for cell in layout.cells
            if cell.row is not None and not cell.row.is_reference
        }
        handles = [Line2D([], [], color=ink, marker=marker, label=line) for line, (ink, marker) in drawn.items()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=10
        )
        return figure


Styles = dict[tuple[str, str], tuple[str, str]]  # of a line's name and method: colour and marker


@dataclass(frozen=True)
class _Axis:
    """Where the values along the axis stand."""

    values: tuple[Any, ...]
    logarithmic: bool
    numbers: bool

    @classmethod
    def of(cls, layout: Layout, view: View) -> "_Axis":
        values = tuple(layout.columns)
        numbers = numeric(values)
        positive = numbers and min(values) > 0
        return cls(values, positive and (view.x == "batch" or max(values) >= WIDE_ENOUGH * min(values)), numbers)

    def at(self, x: Any, shift: float = 0.0) -> float:
        """Where a value is drawn, moved by a share of the distance between neighbours."""
        if self.logarithmic:
            return float(x * 2**shift)
        distance = (self.values[-1] - self.values[0]) / max(1, len(self.values) - 1) if self.numbers else 1.0
        return float(x if self.numbers else self.values.index(x)) + float(shift * distance)

    def apply(self, axes: Axes) -> None:
        """Scale, ticks and limits."""
        if not self.values:
            axes.set_xticks([])
            return
        if self.logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xticks([self.at(x) for x in self.values], [value_text(x) for x in self.values])
        axes.minorticks_off()
        axes.set_xlim(self.at(self.values[0], -0.3), self.at(self.values[-1], 0.3))


def _styles(layout: Layout, by_panel: bool) -> Styles:
    """A colour a method, as everywhere; where lines of one method differ in something else, a colour a line."""
    lines = list(dict.fromkeys((cell.line, cell.method) for cell in layout.cells))
    colours = colours_of(list(dict.fromkeys(method for _, method in lines)))
    if by_panel or len({method for _, method in lines}) == len(lines):
        return {(line, method): colours[method] for line, method in lines}
    return {key: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, key in enumerate(lines)}


def _is_reference(cells: Iterable[Cell]) -> bool:
    """Whether a line has nothing but the reference."""
    return all(cell.row is None or cell.row.is_reference for cell in cells)


def _draw(
    axes: Axes, layout: Layout, panel: str, axis: _Axis, view: View, styles: Styles, grey: bool = False
) -> list[tuple[float, str, str]]:
    """Fills a pair of axes; heights, names and colours of the lines' ends."""
    ends = _reference(axes, layout.references(panel), axis, view)
    if grey:
        plain = [c for c in layout.cells if c.method == REFERENCE and c.panel != panel]
        draw_line(axes, _points(plain, axis, view), MUTED, ".", faint=True)
    floor = -math.inf if view.floor is None else view.floor
    below: list[tuple[float, float, str]] = []
    # The reference is drawn already.
    lines = {line: cells for line, cells in layout.lines(panel).items() if not _is_reference(cells.values())}
    along = [line for line, cells in lines.items() if any(x != WITHOUT for x in cells)]
    for line, cells in lines.items():
        colour, marker = styles[line, next(iter(cells.values())).method]
        # Side by side, or intervals hide each other.
        shift = 0.05 * (along.index(line) - (len(along) - 1) / 2) if line in along else 0.0
        below += [(axis.at(x), mean, colour) for x, mean in _means(cells, view) if mean < floor]
        if (end := draw_line(axes, _points(list(cells.values()), axis, view, shift), colour, marker)) is not None:
            ends.append((end, line, colour))
        if WITHOUT in cells and (estimate := _estimate(cells[WITHOUT], view)) is not None:
            axes.axhline(estimate.mean, color=colour, linewidth=1.4)
            if estimate.mean < floor and axis.values:
                below.append((axis.at(axis.values[0]), estimate.mean, colour))
            ends.append((estimate.mean, line, colour))
    axis.apply(axes)
    axes.set_ylim(*_limits(layout, view))
    _write_below(axes, below)
    return [(max(end, axes.get_ylim()[0]), name, colour) for end, name, colour in ends]


def _limits(layout: Layout, view: View) -> tuple[float, float]:
    """Of the axis of values, for all panels: so that every interval is on it, but for what `floor` cuts off."""
    shown = [estimate for cell in layout.cells if (estimate := _estimate(cell, view)) is not None]
    references = [cell.reference.accuracy for cell in layout.cells if cell.reference is not None]
    shown += [each for each in references if each is not None] if view.y == "score" else [Estimate(0.0, None, 1)]
    ends = [mean + sign * (width or 0.0) for mean, width, _ in shown for sign in (-1, 1)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    if view.floor is not None:
        low, high = view.floor, max(high, view.floor + 1)  # all may lie below it
    margin = 0.05 * max(high - low, 0.1)
    low, high = low - margin * (view.floor is None), high + margin
    # Two seeds can give intervals that no accuracy reaches.
    return (max(low, 0.0), min(high, 100.5)) if view.y == "score" else (low, high)


def _write_below(axes: Axes, below: Sequence[tuple[Any, float, str]]) -> None:
    """Writes the means that lie below the axis, by place, at its lower end; those of one place on top of each other."""
    count: dict[Any, int] = {}
    for x, mean, colour in below:
        height = count[x] = count.get(x, -1) + 1
        axes.annotate(
            f"{mean:.0f} \N{DOWNWARDS ARROW}".replace("-", "\N{MINUS SIGN}"),
            (x, axes.get_ylim()[0]),
            (0, 3 + 11 * height),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )


def _points(cells: Sequence[Cell], axis: _Axis, view: View, shift: float = 0.0) -> list[tuple[float, Estimate]]:
    placed = [(cell.x, _estimate(cell, view)) for cell in cells if cell.x != WITHOUT]
    return sorted((axis.at(x, shift), estimate) for x, estimate in placed if estimate is not None)


def _means(cells: Mapping[Any, Cell], view: View) -> list[tuple[Any, float]]:
    found = [(x, _estimate(cell, view)) for x, cell in cells.items() if x != WITHOUT]
    return [(x, estimate.mean) for x, estimate in found if estimate is not None]


def _estimate(cell: Cell, view: View) -> Estimate | None:
    if cell.row is None:
        return None
    if view.y == "score":
        return cell.row.accuracy
    return Estimate(0.0, None, cell.row.runs) if cell.row.is_reference else cell.row.difference


def _reference(axes: Axes, references: dict[Any, Row], axis: _Axis, view: View) -> list[tuple[float, str, str]]:
    """Draws the reference, across where it is one and point by point where it differs along the axis."""
    found = {x: row.accuracy for x, row in references.items() if row.accuracy is not None}
    if not found:
        return []
    row = next(iter(references.values()))
    name = f"{row.label} at {row.batch}"
    if view.y == "difference":
        axes.axhline(0, color=MUTED, linestyle=DASHED, linewidth=1.4, zorder=1.5)
        return [(0.0, name, MUTED)]
    if len(set(references.values())) == 1:
        return [(draw_reference(axes, next(iter(found.values()))), name, MUTED)]
    places = sorted((axis.at(x), estimate) for x, estimate in found.items())
    x, means = [place for place, _ in places], [estimate.mean for _, estimate in places]
    widths = [estimate.half_width or 0.0 for _, estimate in places]
    axes.plot(x, means, color=MUTED, linestyle=DASHED, linewidth=1.4, zorder=1.5)
    low = [mean - width for mean, width in zip(means, widths, strict=True)]
    high = [mean + width for mean, width in zip(means, widths, strict=True)]
    axes.fill_between(x, low, high, color=MUTED, alpha=0.12, linewidth=0)
    return [(means[-1], name, MUTED)]
