"""The figures of a comparison; every line carries its name."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anybatch.lab.panels import MANY, panels
from anybatch.lab.statistics import Estimate
from anybatch.lab.summary import REFERENCE, Row, Summary, headed
from anybatch.lab.training import RunResult
from anybatch.methods import METHODS
from anybatch.reporting.style import MARKERS, MUTED, SERIES, STYLE
from anybatch.typed import split_method

__all__ = [
    "DASHED",
    "accuracy_figure",
    "colours_of",
    "curves_figure",
    "draw_line",
    "draw_reference",
    "name_lines",
    "run_figure",
]

DASHED: Any = (0, (5, 3))
WIDTH = 17  # characters of a label's line


def accuracy_figure(summary: Summary) -> Figure:
    """The measure against batch size, with 95 % intervals over seeds; the reference is dashed.

    Beyond a handful of methods each has a panel of its own, with BatchNorm's line in grey.
    """
    methods, colours = summary.methods, colours_of(summary.methods)
    rows = {method: _rows(summary, method) for method in methods}
    title, xlabel = headed(summary.measure), f"{summary.examples} a normalization layer sees at once"
    with mpl.rc_context(STYLE):
        if len(methods) > MANY:

            def draw(axes: Axes, place: int) -> None:
                _reference(axes, summary)
                if REFERENCE in rows and methods[place] != REFERENCE:
                    draw_line(axes, _points(rows[REFERENCE]), MUTED, ".", faint=True)
                draw_line(axes, _points(rows[methods[place]]), *colours[methods[place]])
                _scales(axes, summary)

            names, inks = [rows[m][0].label for m in methods], [colours[m][0] for m in methods]
            reference = summary.reference
            at = f" (dashed: BatchNorm at batch {reference.batch}; grey: BatchNorm)" if reference else ""
            return panels(names, inks, draw, title + at, xlabel, MUTED)
        figure = Figure(figsize=(6.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        ends: list[tuple[float, str, str]] = []
        for place, method in enumerate(methods):
            shift = 2 ** (0.04 * (place - (len(methods) - 1) / 2))  # side by side, or intervals hide each other
            if drawn := draw_line(axes, _points(rows[method], shift), *colours[method]):
                ends.append((drawn, rows[method][0].label, colours[method][0]))
        if mean := _reference(axes, summary):
            ends.append((mean, f"BatchNorm at {summary.reference.batch if summary.reference else ''}", MUTED))
        _scales(axes, summary)
        axes.set_xlabel(xlabel)
        axes.set_title(title, loc="left", fontsize=12, color=MUTED)
        name_lines(axes, ends)
        return figure


def curves_figure(summary: Summary, results: Iterable[RunResult]) -> Figure:
    """Training loss at the smallest batch size, mean over seeds, smoothed over 3 points; the reference is dashed."""
    curves = _curves(summary, results)
    colours = colours_of(summary.methods)
    title = f"Training loss at batch {summary.smallest_batch}, mean over seeds"
    with mpl.rc_context(STYLE):
        methods = [method for method in summary.methods if (method, False) in curves]
        if len(methods) > MANY:

            def draw(axes: Axes, place: int) -> None:
                for (_, is_reference), (x, y) in curves.items():
                    if is_reference:
                        axes.plot(x, y, color=MUTED, linestyle=DASHED, linewidth=1.2)
                axes.plot(*curves[methods[place], False], color=colours[methods[place]][0], linewidth=1.8)

            names = [_rows(summary, method)[0].label for method in methods]
            return panels(names, [colours[m][0] for m in methods], draw, title, "epochs", MUTED)
        figure = Figure(figsize=(6.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for (method, is_reference), (x, y) in sorted(curves.items(), key=lambda item: item[0][1]):
            row = next(r for r in summary.rows if r.method == method and r.is_reference == is_reference)
            colour = MUTED if is_reference else colours[method][0]
            axes.plot(x, y, color=colour, linestyle=DASHED if is_reference else "-", linewidth=1.8)
            ends.append((y[-1], f"{row.label} at {row.batch}" if is_reference else row.label, colour))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epochs")
        axes.set_title(title, loc="left", fontsize=12, color=MUTED)
        axes.margins(x=0.01)
        name_lines(axes, ends)
        return figure


def _wrapped(text: str) -> str:
    """In lines of a label's width; what is in brackets stays together where it fits."""

    def together(brackets: re.Match[str]) -> str:
        return brackets[0].replace(" ", "\N{NO-BREAK SPACE}") if len(brackets[0]) <= WIDTH else brackets[0]

    return textwrap.fill(re.sub(r"\(.*\)", together, text), WIDTH, break_long_words=False)


def _rows(summary: Summary, method: str) -> list[Row]:
    batches = {row.batch for row in summary.rows if not row.is_reference}
    rows = [row for row in summary.rows if row.method == method and (not row.is_reference or row.batch in batches)]
    return sorted(rows, key=lambda row: row.batch)


def _curves(summary: Summary, results: Iterable[RunResult]) -> dict[tuple[str, bool], tuple[list[float], list[float]]]:
    """Epochs and smoothed mean loss, by method and whether it is the reference."""
    series: dict[tuple[str, bool], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        config = result.config
        is_reference = summary.reference is not None and (config.method, config.batch) == (
            summary.reference.method,
            summary.reference.batch,
        )
        if is_reference or config.batch == summary.smallest_batch:
            for epochs, loss in result.train_loss:
                series[config.method, is_reference][epochs].append(loss)
    return {
        key: (sorted(points), _smooth([fmean(points[epochs]) for epochs in sorted(points)]))
        for key, points in series.items()
    }


def colours_of(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method: by its place in the table, so always the same; variants take what is left."""
    places = {name: place % len(SERIES) for place, name in enumerate(METHODS)}
    taken: dict[str, int] = {}
    for method in sorted(methods, key=lambda method: method not in places):
        free = [place for place in range(len(SERIES)) if place not in taken.values()]
        place = places.get(split_method(method)[0], 0)
        taken[method] = place if place in free or not free else free[0]
    return {method: (SERIES[place], MARKERS[place % len(MARKERS)]) for method, place in taken.items()}


def _reference(axes: Axes, summary: Summary) -> float | None:
    """Draws the reference as a dashed line with its interval, and says at which height."""
    reference = summary.reference
    if reference is None or reference.accuracy is None:
        return None
    return draw_reference(axes, reference.accuracy)


def draw_reference(axes: Axes, estimate: Estimate) -> float:
    """Draws what the others are compared with, dashed and across, with its interval; at which height."""
    mean, half_width, _ = estimate
    axes.axhline(mean, color=MUTED, linestyle=DASHED, linewidth=1.4, zorder=1.5)
    axes.axhspan(mean - (half_width or 0), mean + (half_width or 0), color=MUTED, alpha=0.12, linewidth=0)
    return mean


def _scales(axes: Axes, summary: Summary) -> None:
    batches = sorted({row.batch for row in summary.rows if not row.is_reference})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    if batches:
        axes.set_xlim(batches[0] / 1.15, batches[-1] * 1.15)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100.5))  # two seeds can give intervals that no accuracy reaches


def _points(rows: Sequence[Row], shift: float = 1.0) -> list[tuple[float, Estimate]]:
    return [(row.batch * shift, row.accuracy) for row in rows if row.accuracy is not None]


def draw_line(
    axes: Axes, points: Sequence[tuple[float, Estimate]], colour: str, marker: str, faint: bool = False
) -> float | None:
    """Draws means with their intervals, and says at which height the line ends, on the right; None of no points."""
    if not points:
        return None
    x, means = [place for place, _ in points], [a.mean for _, a in points]
    half_widths = [a.half_width or 0.0 for _, a in points]
    axes.errorbar(
        x,
        means,
        yerr=half_widths if any(half_widths) else None,
        color=colour,
        marker=marker,
        markersize=4 if faint else 6,
        linewidth=1.2 if faint else 2,
        elinewidth=1.2,
        capsize=3,
    )
    return means[-1]


def name_lines(axes: Axes, names: Sequence[tuple[float, str, str]], line_height: float = 0.058) -> None:
    """Writes each name right of the axes at the height where its line ends, moved apart where they would overlap.

    Args:
        axes: with everything drawn.
        names: height in data units, text, colour.
        line_height: of a line of text, as a share of the height of the axes.
    """
    low, high = axes.get_ylim()
    wanted = sorted(((y - low) / (high - low), _wrapped(text), colour) for y, text, colour in names)
    heights = [height for height, _, _ in wanted]
    half = [line_height * (text.count("\n") + 1.25) / 2 for _, text, _ in wanted]
    for _ in range(200):  # push overlapping neighbours apart, half each, until they rest
        for i in range(1, len(heights)):
            if (overlap := half[i - 1] + half[i] - (heights[i] - heights[i - 1])) > 0:
                heights[i - 1] -= overlap / 2
                heights[i] += overlap / 2
        if heights:
            heights[0] = max(heights[0], half[0])
            heights[-1] = min(heights[-1], 1 - half[-1] / 2)
    for height, (true_height, text, colour) in zip(heights, wanted, strict=True):
        axes.annotate(
            text,
            xy=(1.0, true_height),
            xytext=(1.06, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=11,
            linespacing=1.0,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 3,
                "shrinkB": 0,
            },
        )


def _smooth(values: Sequence[float]) -> list[float]:
    return [fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def run_figure(result: RunResult) -> Figure:
    """Training loss of one run, and on an axis of its own the score after each epoch."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        if result.train_loss:
            x, y = zip(*result.train_loss, strict=True)
            axes.plot(x, _smooth(y), color=SERIES[0], linewidth=1.8)
        axes.set_xlabel("epochs")
        axes.set_title("Training loss", loc="left", fontsize=12, color=SERIES[0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        scored = [(point["epoch"], point["accuracy"]) for point in result.curve if point["accuracy"] is not None]
        if scored:
            other = axes.twinx()
            epochs, scores = zip(*scored, strict=True)
            other.plot(epochs, scores, color=SERIES[1], marker="o", markersize=4, linewidth=1.2)
            other.set_ylim(bottom=0)
            other.grid(visible=False)
            other.set_title(headed(result.config.measure), loc="right", fontsize=12, color=SERIES[1])
        return figure
