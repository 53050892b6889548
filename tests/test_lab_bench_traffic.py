"""Bytes: alive, kept and moved."""

import copy

import pytest
import torch

from anybatch.lab.bench import BenchConfig, Row, traffic
from anybatch.lab.bench.subjects import batches_of, subject
from anybatch.lab.bench.traffic import Meter, copy_bandwidth, measure

KIB = 256  # float32 values in a KiB


def test_operators_move_their_inputs_and_outputs_and_views_are_free() -> None:
    x, y = torch.ones(4 * KIB), torch.ones(4 * KIB)
    with Meter() as meter:
        x + y
        assert meter.moved == 12 * 1024
        x.view(2, -1).t()[0].detach()
        x.split(KIB)
        assert meter.moved == 12 * 1024
        x * x  # read once
        assert meter.moved == 20 * 1024
        x.copy_(y)  # what is overwritten is not read
        assert meter.moved == 28 * 1024
        x.add_(y)  # here it is
        assert meter.moved == 40 * 1024
        y[:KIB].expand(4, KIB) * 1.0  # of an expanded tensor what is there; written whole
        assert meter.moved == 45 * 1024
        torch.empty_strided((KIB,), (1,))
        assert meter.moved == 45 * 1024


def test_peak_counts_what_is_alive_at_once() -> None:
    held = torch.ones(2 * KIB)
    meter = Meter([held, held.view(2, -1)])
    assert (meter.alive, meter.peak) == (2048, 2048)
    with meter:
        a = held + 1
        b = a.view(-1) + 1  # keeps nothing but itself
        del a
        c = b + 1
        del b, c
        assert meter.alive == 2048
        unseen = torch.ones(KIB)
    assert (meter.alive, meter.peak) == (3072, 6144)
    del unseen
    assert meter.alive == 2048
    meter.close()
    del held
    assert meter.alive == 2048


def test_saved_activations_are_alive_until_the_backward() -> None:
    """What only autograd holds, in C++, counts too."""
    x = torch.ones(KIB, requires_grad=True)
    with Meter([x]) as meter:
        loss = x.exp().exp().exp().sum()
        assert meter.alive == 4 * 1024 + 4
        loss.backward()
        del loss
    assert meter.alive == 2 * 1024  # x and its gradient


@pytest.mark.parametrize(
    ("method", "units"), [("bn", 0.0), ("released(window=3)", 6.0), ("cbn(window=3,kind='ring')", 3.0)]
)
def test_history_is_in_units_of_the_weights(method: str, units: float) -> None:
    config = BenchConfig(what="layer", channels=16, image_size=8)
    steps = subject(config, Row(method), batches_of(config))
    for _ in range(4):
        steps()
    found = measure(steps)
    weights = 16 * 16 * 9 + 2 * 16
    assert found.weights == 4 * weights
    assert found.history / found.weights == pytest.approx(units, rel=0.2)
    least = found.weights + found.history + 3 * 4 * 4 * 16 * 8 * 8  # input, output of the map, and of the norm
    assert least < found.peak < 4 * least
    assert found.moved > found.peak


def test_a_step_is_measured_without_leaving_a_trace() -> None:
    """Measuring one takes a step like any other."""
    config = BenchConfig(network="small-resnet", image_size=8, batch=2)
    steps = subject(config, Row("cbn(refresh=1)"), batches_of(config))  # every step like any other
    twin = steps.copy()
    measure(steps)
    twin()
    for mine, its in zip(steps.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(mine, its)
    first = measure(steps)
    assert measure(steps) == first
    assert measure(steps, 2).moved == first.moved


def test_what_is_compiled_hides_its_operators() -> None:
    config = BenchConfig(what="layer", channels=4, image_size=8)
    steps = subject(config, Row("bn"), batches_of(config))
    steps.how = "compiled"
    found = measure(steps)
    assert (found.peak, found.moved) == (None, None)
    assert found.weights == 4 * (4 * 4 * 9 + 8)


def test_copy_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: next(clock) / 2)
    monkeypatch.setattr(traffic, "COPIED", 4096)
    assert copy_bandwidth("cpu") == 2 * 4096 / 0.5


def test_released_frees_what_it_forgets() -> None:
    """Measured twice, its lists full, the same peak: an entry that goes is noticed."""
    config = BenchConfig(what="layer", channels=16, image_size=8, window=2)
    steps = subject(config, Row("released"), batches_of(config))
    for _ in range(3):
        steps()
    once = measure(steps)
    assert measure(copy.copy(steps)) == once
