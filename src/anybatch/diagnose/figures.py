"""The few kinds of figure that the experiments draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..reporting.style import GRID, INK, MUTED, SERIES, STYLE

__all__ = ["Heat", "Panel", "heat_maps", "lines"]

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Panel:
    """Some lines on one pair of axes.

    Args:
        title: what is on the y axis.
        series: x and y by name; nan is left out.
        xlabel: what is on the x axis.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        level: a y to draw a dashed line at.
        steps: join the points by steps, as of a histogram.
        ticks: names of x = 1, 2, ...
    """

    title: str
    series: Series
    xlabel: str
    log: str = ""
    level: float | None = None
    steps: bool = False
    ticks: Sequence[str] = ()


@dataclass(frozen=True)
class Heat:
    """One tile of a heat map: rows of values, and what rows and columns are."""

    title: str
    rows: Sequence[Sequence[float]]
    xlabel: str
    ylabel: str


def lines(panels: Sequence[Panel]) -> Figure:
    """Panels side by side, the same names in the same colours, one legend."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, 4.3 * len(panels)), 3.7), layout="constrained")
        names = list(dict.fromkeys(name for panel in panels for name in panel.series))
        colours = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}
        grid: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            _panel(axes, panel, colours)
        if len(names) > 1:
            handles = [mpl.lines.Line2D([], [], color=colours[name], linewidth=2.2) for name in names]
            figure.legend(
                handles, names, loc="outside upper left", ncols=min(3, len(names)), frameon=False, fontsize=11
            )
        return figure


def _panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for name, (x, y) in panel.series.items():
        marker = "o" if len(x) <= 40 and not panel.steps else ""
        style = "steps-mid" if panel.steps else "default"
        axes.plot(x, y, color=colours[name], marker=marker, markersize=4, linewidth=1.8, drawstyle=style)
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    if panel.level is not None:
        axes.axhline(panel.level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
    if panel.ticks:
        axes.set_xticks(range(1, len(panel.ticks) + 1), panel.ticks, rotation=60, ha="right", fontsize=8)
    axes.set_xlabel(panel.xlabel, fontsize=11)
    axes.set_title(panel.title, loc="left", fontsize=11.5, color=MUTED)


def heat_maps(
    tiles: Sequence[Heat], columns: int, label: str, rows: tuple[float, float] | None = None, signed: bool = False
) -> Figure:
    """Tiles in rows of ``columns``, on one scale of colours.

    Args:
        tiles: row by row.
        columns: tiles a row.
        label: of the scale.
        rows: what the first and the last row of a tile stand for; None: their numbers.
        signed: zero is in the middle of the scale.
    """
    finite = sorted(v for tile in tiles for row in tile.rows for v in row if abs(v) < float("inf"))
    low, high = (finite[0], finite[-1]) if finite else (0.0, 1.0)
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    with mpl.rc_context(STYLE):
        down = -(-len(tiles) // columns)
        figure = Figure(figsize=(1.4 + 2.9 * columns, 0.5 + 2.5 * down), layout="constrained")
        grid: Any = figure.subplots(down, columns, squeeze=False)
        image = None
        for place, axes in enumerate(grid.flat):
            if place >= len(tiles):
                axes.set_visible(False)
                continue
            tile = tiles[place]
            end = len(tile.rows[0]) + 0.5, *((rows[1], rows[0]) if rows else (len(tile.rows) + 0.5, 0.5))
            image = axes.imshow(
                tile.rows,
                aspect="auto",
                interpolation="nearest",
                cmap="RdBu_r" if signed else "viridis",
                vmin=low,
                vmax=high,
                extent=(0.5, *end),
            )
            axes.grid(False)
            axes.set_title(tile.title, loc="left", fontsize=10.5, color=INK)
            axes.set_xlabel(tile.xlabel, fontsize=10)
            if place % columns == 0:
                axes.set_ylabel(tile.ylabel, fontsize=10)
            axes.tick_params(labelsize=9)
        if image is not None:
            bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.9)
            bar.set_label(label, fontsize=10, color=MUTED)
            bar.outline.set_edgecolor(GRID)
            bar.ax.tick_params(labelsize=9)
        return figure
