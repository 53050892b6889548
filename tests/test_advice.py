"""ab.advise: forecasts against interpolation by hand, the choice among them, CBN's window, and how it is done."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.diagnose import Advice, batch_noise, history_error
from anybatch.diagnose.advice import recommend
from anybatch.diagnose.experience import forecast_of

from .diagnose_nets import batches, chain

ce = F.cross_entropy
SIMPLEST_FIRST = ("bn", "accumulated", "renorm", "cbn", "gn", "proxynorm-group")
FOLDS = ("bn", "accumulated", "renorm", "cbn")
LEVELS = {"1": 0.4, "2": 0.2, "4": 0.1, "32": 0.05}


def noise(**at: float) -> Any:
    """Measured: noise by batch size, b1=0.4."""
    levels = {int(key[1:]): level for key, level in {"b1": 0.4, "b8": 0.1, "b32": 0.05, **at}.items()}
    errors = torch.tensor([list(levels.values())], dtype=torch.float64)
    return batch_noise.BatchNoise(
        ("a", "b", "c"), torch.tensor([64, 16, 4]), torch.tensor([3.0, 2.0, 1.0]), tuple(levels), errors, 0 * errors, 64
    )


def history(*drift: float) -> Any:
    """Measured: what carried moments are off by after 1, 2, ... steps."""
    errors = torch.tensor([drift or (0.0,) * 8], dtype=torch.float64)
    by_kind = dict.fromkeys(history_error.KINDS, errors)
    return history_error.HistoryError(
        ("a",), torch.arange(1, errors.shape[1] + 1), by_kind, {k: 0 * errors for k in by_kind}, 0 * errors, 0.05
    )


def experience(monkeypatch: pytest.MonkeyPatch, **points: float) -> None:
    """Runs in which a method always came to so many points; far below by default."""
    by_name = {name: points.get(name.replace("-", "_"), -50.0) for name in SIMPLEST_FIRST}
    known = {"noise": LEVELS, "points": {name: dict.fromkeys(LEVELS, value) for name, value in by_name.items()}}
    monkeypatch.setattr("anybatch.diagnose.experience._experience", lambda: known)


def test_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a known noise cost; between two the logarithm of the noise says how much; no more beyond."""
    known = {"noise": LEVELS, "points": {"bn": {"1": -30.0, "2": -6.0, "4": -2.0, "32": 0.0}}}
    monkeypatch.setattr("anybatch.diagnose.experience._experience", lambda: known)
    for batch, level in LEVELS.items():
        assert forecast_of("bn", level) == pytest.approx(known["points"]["bn"][batch])
    assert forecast_of("bn", math.sqrt(0.4 * 0.2)) == pytest.approx(-18)
    assert forecast_of("bn", 0.2 * 2**0.25) == pytest.approx(-12)
    assert forecast_of("bn", 0.12) == pytest.approx(-2 - 4 * math.log(1.2) / math.log(2))
    assert forecast_of("bn", 9.0) == -30
    assert [forecast_of("bn", level) for level in (0.05, 0.01, 0.0)] == [0, 0, 0]


def test_our_own_runs() -> None:
    """Every method at every noise; BatchNorm at batch 32 is what points are against."""
    advice = recommend(noise(), history(), 1, 2)
    assert {c.method.partition("(")[0] for c in advice.candidates} == set(SIMPLEST_FIRST)
    assert all(math.isfinite(c.points) for c in advice.candidates)
    assert {c.method.partition("(")[0] for c in advice.candidates if c.folds} == set(FOLDS)
    assert forecast_of("bn", 0.0) == 0


@pytest.mark.parametrize(
    ("points", "more", "chosen"),
    [
        ({"bn": 0, "renorm": 0.8, "cbn": 1.0}, {}, "bn"),
        ({"bn": 0, "renorm": 0.4, "cbn": 1.2}, {}, "cbn"),
        ({"bn": 0, "renorm": 1.2, "cbn": 0.1}, {}, "renorm"),
        ({"bn": 0, "renorm": 0.4, "cbn": 1.6}, {}, "cbn"),
        ({"bn": 0, "accumulated": 5, "renorm": 2}, {}, "renorm"),
        ({"bn": 0, "accumulated": 5, "renorm": 1}, {"micro_batches": 2}, "accumulated"),
        ({"bn": 0, "accumulated": 4.6, "renorm": 5}, {"micro_batches": 2}, "accumulated"),
        ({"bn": 0, "gn": 8, "proxynorm_group": 10}, {}, "bn"),
        ({"bn": 0, "gn": 8, "proxynorm_group": 10}, {"folds": False}, "proxynorm-group"),
        ({"bn": 0, "gn": 9.6, "proxynorm_group": 10}, {"folds": False}, "gn"),
        ({"bn": 0, "cbn": 9.8, "proxynorm_group": 10}, {"folds": False}, "cbn"),
    ],
)
def test_the_surest_within_a_point(
    monkeypatch: pytest.MonkeyPatch, points: dict[str, float], more: dict[str, Any], chosen: str
) -> None:
    """First; then the others by their forecasts, also those that do not fold; the gain is over BatchNorm there."""
    experience(monkeypatch, **points)
    advice = recommend(noise(), history(), 1, channels=[8], **more)
    first, *others = advice.candidates
    assert first.method.partition("(")[0] == chosen
    assert [c.points for c in others] == sorted((c.points for c in others), reverse=True)
    names = {c.method.partition("(")[0] for c in advice.candidates}
    assert names == set(SIMPLEST_FIRST) - ({"accumulated"} if more.get("micro_batches", 1) == 1 else set())
    assert advice.gain == pytest.approx(first.points - points["bn"])
    assert advice.config == ab.parse_method(advice.method)


def test_without_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """CBN is no candidate, and it is said why."""
    experience(monkeypatch, bn=0, cbn=9, renorm=2)
    advice = recommend(noise(), None, 1, why="no norm follows a map")
    assert advice.method == "renorm"
    assert not any(c.method.startswith("cbn") for c in advice.candidates)
    assert advice.evidence[-1] == "CBN is left out: no norm follows a map"


@pytest.mark.parametrize(
    ("channels", "groups"), [((64, 128), 32), ((12, 24, 48), 4), ((48,), 16), ((8,), 8), ((5, 7), 1), ((), 32)]
)
def test_groups_divide_all_channels(channels: tuple[int, ...], groups: int) -> None:
    typed = {c.method for c in recommend(noise(), history(), 1, channels=channels).candidates}
    assert {f"gn(groups={groups})", f"proxynorm-group(groups={groups})"} < typed


def pooled(level: float, drift: Callable[[float], float], k: int, micro_batches: int) -> float:
    return math.hypot(level / math.sqrt(k), drift(k / 2 / micro_batches))


@pytest.mark.parametrize(
    ("level", "rate", "micro_batches", "window"),
    [
        (0.4, 0.0, 1, 64),
        (0.4, 0.01, 1, 64),  # two examples a batch: 0.107 at 64, 0.128 at 32: k is 32, 16
        (0.4, 0.02, 1, 64),  # 0.175 at 64, 0.189 at 32, 0.163 at 16
        (0.4, 0.1, 1, 16),  # 0.803 at 64 and 32, 0.424 at 16
        (0.1, 0.03, 1, 16),  # 0.241, 0.241, 0.125
        (0.4, 0.03, 4, 64),  # ages are of steps: 0.139, 0.117, 0.145
        (0.2, 0.1, 64, 64),
    ],
)
def test_the_window(
    monkeypatch: pytest.MonkeyPatch, level: float, rate: float, micro_batches: int, window: int
) -> None:
    """64 examples, unless fewer's statistics are off by less than three quarters of theirs; by hand for a drift that
    grows by ``rate`` a step."""
    experience(monkeypatch, cbn=9)
    advice = recommend(noise(b2=level), history(*(rate * age for age in range(1, 9))), 2, micro_batches)
    errors = {k: pooled(level, lambda age: rate * min(age, 8), k, micro_batches) for k in (8, 16, 32)}
    best = min(errors, key=errors.get)
    assert window == 2 * (best if errors[best] < 0.75 * errors[32] else 32)
    assert advice.method == ("cbn" if window == 64 else f"cbn(window_examples={window})")
    assert advice.noise == pytest.approx({"batch": level, "pooled": errors[window // 2], "batch 32": 0.05})
    assert f"pooled as advised by {100 * errors[window // 2]:.0f} %" in str(advice)


def test_the_drift_of_a_window_between_two_ages() -> None:
    """Its mean age is 4 / 3 steps here: a third of the way from the drift after one step to that after two."""
    advice = recommend(noise(), history(0.01, 0.04, 9.0), 1, micro_batches=24)
    assert advice.method == "cbn"
    assert advice.noise["pooled"] == pytest.approx(math.hypot(0.4 / math.sqrt(64), 0.02))


Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    ("bn", {}),
    ("accumulated", {"micro_batches": 4}),
    ("renorm", {}),
    ("cbn", {}),
    ("cbn", {"micro_batches": 2}),
    ("gn", {"folds": False}),
    ("proxynorm-group", {"folds": False}),
]
every_case = pytest.mark.parametrize(("chosen", "more"), CASES)


def chosen_advice(monkeypatch: pytest.MonkeyPatch, chosen: str, more: dict[str, Any]) -> Advice:
    experience(monkeypatch, **{chosen.replace("-", "_"): 9})
    return recommend(noise(), history(0.02, 0.04), 1, channels=[4, 6], **more)


@every_case
def test_what_it_says(monkeypatch: pytest.MonkeyPatch, chosen: str, more: dict[str, Any]) -> None:
    """At most ten lines; the first is the advice."""
    advice = chosen_advice(monkeypatch, chosen, more)
    lines = str(advice).splitlines()
    assert len(lines) <= 10
    steps = f", {more['micro_batches']} batches a step of the optimizer" if "micro_batches" in more else ""
    assert lines[0] == f"At batch 1{steps}: {advice.code}"
    at_1 = f"{advice.gain:+.1f} against BatchNorm at batch 1"
    assert lines[1].strip() == f"forecast: +9.0 points against BatchNorm at batch 32, {at_1}"
    assert "statistics of one example are off by 40 % of a standard deviation" in lines[2]
    assert "an example's 16 positions count for 2 independent samples" in lines[3]
    assert all(f"{c.method} {c.points:+.1f}" in str(advice) for c in advice.candidates[1:])


@every_case
def test_what_it_says_to_do_can_be_done(monkeypatch: pytest.MonkeyPatch, chosen: str, more: dict[str, Any]) -> None:
    """Word by word; it gives what the advised config gives."""
    advice, model = chosen_advice(monkeypatch, chosen, more), chain()
    optimizer, (images, _) = torch.optim.SGD(model.parameters(), lr=0.1), batches(1, 4, torch.float32)[0]
    (line,) = (text for text in str(advice).splitlines() if "to do it: " in text)
    order = line.partition("to do it: ")[2]
    if chosen == "bn":
        assert order == "leave BatchNorm as it is"
        return
    exec(order, {"ab": ab, "model": model, "images": images, "optimizer": optimizer})
    assert eval(advice.code, {"ab": ab}) == advice.config
    twin = chain()
    ab.convert_(twin, advice.config, example_inputs=images)
    assert [repr(module) for module in model] == [repr(module) for module in twin]
    assert type(model[1]) is not nn.BatchNorm2d
    model(images).sum().backward()
    optimizer.step()
