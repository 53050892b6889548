"""The few kinds of figure that the experiments draw."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..reporting.style import GRID, INK, MUTED, SERIES, STYLE
from .panels import Heat, Panel

__all__ = ["draw"]


def draw(panels: Sequence[Panel | Heat]) -> Figure:
    """Panels side by side in one figure, the same names in the same colours, one legend; a heat map by itself."""
    heat = [panel for panel in panels if isinstance(panel, Heat)]
    return _tiles(heat[0]) if heat else _lines([panel for panel in panels if isinstance(panel, Panel)])


def _lines(panels: Sequence[Panel]) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 if len(panels) == 1 else 4.3 * len(panels), 3.6), layout="constrained")
        names = list(dict.fromkeys(name for panel in panels for name in panel.series))
        colours = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}
        grid: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            _panel(axes, panel, colours)
        if len(names) > 1:
            handles = [mpl.lines.Line2D([], [], color=colours[name], linewidth=2.2) for name in names]
            columns = 3 if max(map(len, names)) < 18 else 2 if len(panels) > 1 else 1
            figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=10.5)
        return figure


def _panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    def shown(values: Sequence[float], logarithmic: bool) -> list[float]:
        return [v if v > 0 or not logarithmic else math.nan for v in values]

    series = {name: (shown(x, "x" in panel.log), shown(y, "y" in panel.log)) for name, (x, y) in panel.series.items()}
    for name, (x, y) in series.items():
        marker = "o" if len(x) <= 40 and not panel.steps else ""
        style = "steps-mid" if panel.steps else "default"
        if panel.ticks:  # categories: nothing lies between them
            axes.plot(x, y, color=colours[name], marker="o", markersize=8, linestyle="")
        else:
            axes.plot(x, y, color=colours[name], marker=marker, markersize=4, linewidth=1.8, drawstyle=style)
    some = [any(math.isfinite(v) for values in series.values() for v in values[axis]) for axis in (0, 1)]
    if "x" in panel.log and some[0]:
        axes.set_xscale("log")
    if "y" in panel.log and some[1]:
        axes.set_yscale("log")
    if panel.level is not None:
        axes.axhline(panel.level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
    points = sorted({v for x, _ in series.values() for v in x})
    if panel.ticks:
        axes.set_xticks(range(1, len(panel.ticks) + 1), panel.ticks, fontsize=10)
        axes.set_xlim(0.5, len(panel.ticks) + 0.5)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    elif "x" in panel.log and len(points) <= 8 and all(v == int(v) for v in points):
        axes.set_xticks(points, [str(int(v)) for v in points])
        axes.minorticks_off()
    elif "x" not in panel.log and all(v == int(v) for v in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(panel.xlabel, fontsize=11)
    axes.set_title(panel.title, loc="left", fontsize=11.5, color=MUTED)


def _tiles(heat: Heat) -> Figure:
    tiles, columns = heat.tiles, heat.columns
    finite = [v for tile in tiles for row in tile.rows for v in row if abs(v) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if heat.signed:
        high = max(abs(low), abs(high))
        low = -high
    with mpl.rc_context(STYLE):
        down = -(-len(tiles) // columns)
        figure = Figure(figsize=(1.2 + 2.3 * columns, 0.4 + 2.2 * down), layout="constrained")
        grid: Any = figure.subplots(down, columns, squeeze=False)
        for place, (axes, tile) in enumerate(zip(grid.flat, tiles, strict=False)):
            bottom, top = heat.ends or (len(tile.rows) + 0.5, 0.5)
            image = axes.imshow(
                tile.rows,
                aspect="auto",
                interpolation="nearest",
                cmap="RdBu_r" if heat.signed else "viridis",
                vmin=low,
                vmax=high,
                extent=(0.5, len(tile.rows[0]) + 0.5, bottom, top),
            )
            axes.grid(False)
            axes.set_title(tile.title, loc="left", fontsize=10, color=INK)
            axes.set_xlabel(heat.xlabel if place + columns >= len(tiles) else "", fontsize=10)
            side = f"{tile.side}\n{heat.ylabel}" if tile.side else heat.ylabel
            axes.set_ylabel(side if place % columns == 0 else "", fontsize=10)
            axes.tick_params(labelsize=9)
        for axes in grid.flat[len(tiles) :]:
            axes.set_visible(False)
        bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.9)
        bar.set_label(heat.label, fontsize=10, color=MUTED)
        bar.outline.set_edgecolor(GRID)
        bar.ax.tick_params(labelsize=9)
        return figure
