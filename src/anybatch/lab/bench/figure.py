"""Cost against window, batch or size."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anybatch.lab.bench.records import Outcome, Timing, name_of
from anybatch.lab.bench.sweep import Sweep
from anybatch.lab.panels import MANY, panels
from anybatch.lab.plots import colours_of, name_lines
from anybatch.reporting.style import MUTED, STYLE

__all__ = ["sweep_figure"]

Points = Sequence[tuple[int, float, float, float]]  # a value, and 25 %, median, 75 % there


def sweep_figure(sweep: Sweep, outcomes: Sequence[Outcome]) -> Figure:
    """Time (median, band from 25 to 75 %) and peak memory against the swept setting, both of BatchNorm's at its value.

    Beyond a handful of methods each has a panel of its own, with time alone. What was never timed is left out.
    """
    columns = zip(*(outcome.timings[1:] for outcome in outcomes), strict=True)
    places = [place for place, timings in enumerate(columns, 1) if any(timing.ratios for timing in timings)]
    rows = [outcomes[0].timings[place].row for place in places]
    colours = colours_of([f"{row.method}, {row.how}" if row.how else row.method for row in rows])
    styles = [style for style in colours.values()]
    names = [name_of(row) for row in rows]
    times = [_points(sweep, outcomes, place, _times) for place in places]
    peaks = [_points(sweep, outcomes, place, _peak) for place in places]
    unit = {"step": "a step", "layer": "a layer", "inference": "a forward"}[outcomes[0].config.what]
    with mpl.rc_context(STYLE):
        if len(rows) > MANY:

            def draw(axes: Axes, place: int) -> None:
                _line(axes, times[place], *styles[place])
                _scales(axes, sweep)

            title = f"Time of {unit}, in BatchNorm's (dashed)"
            return panels(names, [ink for ink, _ in styles], draw, title, sweep.axis, MUTED)
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        both = figure.subplots(1, 2)
        for axes, series, title in zip(both, (times, peaks), (f"Time of {unit}", "Peak memory"), strict=True):
            ends = [
                (end, name, style[0])
                for name, points, style in zip(names, series, styles, strict=True)
                if (end := _line(axes, points, *style)) is not None
            ]
            _scales(axes, sweep)
            axes.set_xlabel(sweep.axis)
            axes.set_title(f"{title}, in BatchNorm's (dashed)", loc="left", fontsize=12, color=MUTED)
            if axes is both[1] or not any(peaks):
                name_lines(axes, ends)
        return figure


def _times(outcome: Outcome, timing: Timing) -> tuple[float, float, float] | None:
    return timing.quartiles if timing.ratios else None


def _peak(outcome: Outcome, timing: Timing) -> tuple[float, float, float] | None:
    memory = outcome.memory(timing)
    return None if memory is None else (memory, memory, memory)


def _points(sweep: Sweep, outcomes: Sequence[Outcome], place: int, of: Callable[[Outcome, Timing], Any]) -> Points:
    found = [
        (value, of(outcome, outcome.timings[place])) for value, outcome in zip(sweep.values, outcomes, strict=True)
    ]
    return [(value, *three) for value, three in found if three is not None]


def _line(axes: Axes, points: Points, colour: str, marker: str) -> float | None:
    """Draws one method and says at which height it ends, on the right."""
    if not points:
        return None
    x, low, middle, high = zip(*points, strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, middle, color=colour, marker=marker, markersize=6, linewidth=2)
    return float(middle[-1])


def _scales(axes: Axes, sweep: Sweep) -> None:
    first, last = sweep.values[0], sweep.values[-1]
    axes.axhline(1.0, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.4, zorder=1.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sweep.values, [str(value) for value in sweep.values])
    axes.minorticks_off()
    margin = (last / first) ** 0.05
    axes.set_xlim(first / margin, last * margin)
