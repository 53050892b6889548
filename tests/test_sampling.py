"""The positions that CBN looks at: one of each stretch of a batch, all of them in turn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
from anybatch.core.sampling import enough, positions

PERIOD = 32


@pytest.mark.parametrize(
    ("least", "size", "found"),
    [
        (16, (), 16),
        (16, (1, 1), 16),
        (16, (32, 32), 16),
        (16, (33, 32), 16),
        (16, (64, 64), 64),
        (1, (64, 64), 64),
        (100, (64, 64), 100),
        (16, (24, 24, 24), 216),
        (16, (512, 512), 256),
        (1000, (512, 512), 1000),
    ],
)
def test_of_large_maps_more_positions_are_looked_at(least: int, size: tuple[int, ...], found: int) -> None:
    assert enough(least, size) == found


@pytest.mark.parametrize("per_group", [None, 1])
def test_how_many_positions_goes_by_the_example_not_by_the_batch(per_group: int | None) -> None:
    """At 64 x 64 positions 16 are 64, at one example and at three, and in groups of a batch; 65 are not the same."""
    outputs = []
    for least in (16, 64, 65):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.BatchNorm2d(3))
        ab.convert_(
            model, ab.CBN(positions=least, examples_per_group=per_group), example_inputs=torch.zeros(2, 2, 64, 64)
        )
        for examples in (3, 1, 3, 3):
            torch.manual_seed(examples)
            out = model(torch.randn(examples, 2, 64, 64))
            (out * torch.randn_like(out)).sum().backward()
            with torch.no_grad():
                model[0].weight += 0.1 * torch.randn_like(model[0].weight)
        outputs.append(out.detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def flat(examples: int, size: tuple[int, ...], samples: int, number: int) -> torch.Tensor:
    """Of the positions of batch ``number``, the index in the whole batch."""
    at = positions(examples, size, samples, torch.tensor(number))
    assert ((at >= 0) & (at < torch.tensor([examples, *size])[:, None])).all()
    return sum(c * math.prod(size[i:]) for i, c in enumerate(at))


@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.integers(1, 40),
    st.integers(0, PERIOD - 1),
)
def test_one_of_each_stretch(examples: int, size: tuple[int, ...], samples: int, number: int) -> None:
    """Of S stretches of N L / S positions; where there are no more than S positions, all of them."""
    every = examples * math.prod(size)
    found = flat(examples, size, samples, number)
    if every <= samples:
        assert found.tolist() == list(range(every))
        return
    stretch = torch.arange(samples)
    assert (found >= stretch * every // samples).all()
    assert (found * samples < (stretch + 1) * every).all()


@pytest.mark.parametrize("samples", [1, 5, 16, 21, 32, 34, 55, 64, 89])
@pytest.mark.parametrize("stretch", [2, 7.3, 13])
def test_all_are_visited_evenly_over_a_period(samples: int, stretch: float) -> None:
    """Multiples of the golden ratio leave gaps of at most 0.06 after 32: no position of up to 16 is passed over.

    One that lies in two stretches has visits from both; each is off the mean by less than three.
    """
    every = int(samples * stretch)
    visits = torch.zeros(every)
    for number in range(PERIOD):
        visits[flat(1, (every,), samples, number)] += 1
    assert visits.min() >= 1
    assert (visits - PERIOD * samples / every).abs().max() < 6


def test_batches_at_once_are_batches_one_by_one() -> None:
    numbers = torch.arange(PERIOD).unsqueeze(1)
    together = positions(3, (5, 7), 16, numbers).view(3, PERIOD, -1)
    for number in range(PERIOD):
        assert torch.equal(together[:, number], positions(3, (5, 7), 16, torch.tensor(number)))
