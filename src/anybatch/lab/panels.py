"""One small panel a method, on shared scales: where there are more lines than one pair of axes can name."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLUMNS", "MANY", "panels"]

MANY = 7  # lines that one pair of axes can carry
COLUMNS = 4


def panels(
    names: Sequence[str],
    colours: Sequence[str],
    draw: Callable[[Axes, int], Any],
    title: str,
    xlabel: str,
    ink: str,
    height: float = 2.05,
) -> Figure:
    """A grid of panels with shared scales, each headed by its name.

    Args:
        names: of the panels.
        colours: of the names.
        draw: fills the panel of that number.
        title: of the figure.
        xlabel: under the lowest row.
        ink: colour of title and label.
        height: of a row, in inches.
    """
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.6, 0.7 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        draw(axes, place)
        axes.set_title(textwrap.fill(names[place], 26), loc="left", fontsize=10.5, color=colours[place])
        axes.tick_params(labelsize=10, labelbottom=place + columns >= len(names))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=ink)
    figure.supxlabel(xlabel, fontsize=11, color=ink)
    return figure
