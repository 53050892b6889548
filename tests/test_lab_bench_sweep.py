"""`anybatch bench` over several windows, batches or sizes, and the figure of it."""

from dataclasses import replace

import pytest

from anybatch.errors import AnybatchError
from anybatch.lab.bench import BenchConfig, Outcome, Row, Sweep, Timing, timing, traffic
from anybatch.lab.bench.figure import sweep_figure
from anybatch.lab.bench.traffic import Traffic

SMALL = BenchConfig(methods=("gn(groups=4)",), network="small-resnet", image_size=8, batch=2, rounds=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "COPIED", 2**16)
    monkeypatch.setattr(timing, "LEAST", 1e-9)


def outcomes(sweep: Sweep, methods: int) -> list[Outcome]:
    made = []
    for place, value in enumerate(sweep.values):
        timings = tuple(
            Timing(
                Row("bn") if m == 0 else Row(f"cbn(window={m})"),
                "",
                (0.1, 0.2, 0.3),
                tuple((1 + 0.1 * m * (1 + place)) * r for r in (0.9, 1.0, 1.2)),
                Traffic(100, 100 * m, 1000 + 100 * m * value, 5000),
            )
            for m in range(methods + 1)
        )
        made.append(Outcome(BenchConfig(), timings, 1, 1e6))
    return made


@pytest.mark.parametrize("methods", [2, 9])
def test_figure_shows_every_method_at_every_value(methods: int) -> None:
    sweep = Sweep("window", (2, 8, 32))
    axes = [a for a in sweep_figure(sweep, outcomes(sweep, methods)).axes if a.get_visible()]
    assert len(axes) == (2 if methods == 2 else 9)
    lines = [line for line in axes[0].get_lines() if line.get_marker() != "None"]
    assert len(lines) == (2 if methods == 2 else 1)
    assert list(lines[0].get_xdata()) == [2, 8, 32]
    assert list(lines[0].get_ydata()) == pytest.approx([1.1, 1.2, 1.3])
    assert len(axes[0].collections) == len(lines)  # the bands
    low, high = axes[0].get_ylim()
    assert low < 1.0
    assert high > (1 + 0.1 * methods * 3) * 1.1  # the band of every method, on the shared scale
    if methods == 2:
        assert list(axes[1].get_lines()[1].get_ydata()) == pytest.approx([1.4, 2.6, 7.4])


def test_a_method_refused_at_a_value_has_a_gap_there() -> None:
    sweep = Sweep("batch", (1, 2))
    first, second = outcomes(sweep, 1)
    gap = replace(first, timings=(first.timings[0], Timing(Row("cbn(window=1)"), "", refused="why")))
    axes = sweep_figure(sweep, [gap, second]).axes
    assert list(axes[0].get_lines()[0].get_xdata()) == [2]
    axes = sweep_figure(sweep, [gap, gap]).axes
    assert [line.get_marker() for line in axes[0].get_lines()] == ["None"]  # BatchNorm's alone


def test_sweep_sets_what_it_names() -> None:
    sweep = Sweep.parse("window=8, 2,2")
    configs = sweep.configs(replace(SMALL, methods=("cbn", "released", "gn", "iebn", "cbn(pooling='equal')")))
    norms = [[config.norm(row.method) for row in config.rows()] for config in configs]
    windows = [[getattr(norm, "window", None) for norm in each] for each in norms]
    assert windows == [[None, w, w, None, 1, w] for w in (2, 8)]
    assert norms[0][-1].pooling == "equal"
    assert [c.image_size for c in Sweep.parse("image-size=8,16").configs(SMALL)] == [8, 16]
    done: list[tuple[int, int]] = []
    found = list(Sweep.parse("batch=2,3").run(replace(SMALL, rounds=2), lambda *at: done.append(at)))
    assert [outcome.config.batch for outcome in found] == [2, 3]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("widow=2,3", "cannot sweep over 'widow': choose window, batch"),
        ("batch=2", "'batch=2' does not give two or more"),
        ("batch=2,b", "whole numbers"),
        ("channels=2,4", "give --what layer"),
        ("batch=0,4", "batch is 0"),
        ("window=0,4", "window"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused_before_anything_runs(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_bench", None)
    with pytest.raises(AnybatchError, match=said):
        list(Sweep.parse(text).run(replace(SMALL, methods=("cbn",))))
