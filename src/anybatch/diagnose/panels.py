"""What the experiments draw, as plain data: some lines on a pair of axes, or tiles of a heat map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Heat", "Panel", "Tile"]

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
class Tile:
    """One tile of a heat map: rows of values under a title, and what the tiles beside it have in common."""

    title: str
    rows: Sequence[Sequence[float]]
    side: str = ""


@dataclass(frozen=True)
class Heat:
    """Tiles on one scale of colours.

    Args:
        tiles: row by row.
        columns: tiles a row.
        label: of the scale.
        xlabel: what the columns of a tile are.
        ylabel: what its rows are.
        ends: what the last and the first row of a tile stand for; None: their numbers.
        signed: zero is in the middle of the scale.
    """

    tiles: Sequence[Tile]
    columns: int
    label: str
    xlabel: str
    ylabel: str
    ends: tuple[float, float] | None = None
    signed: bool = False
