"""The positions that CBN looks at: one of each stretch of a batch, all of them in turn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.core.sampling import positions

PERIOD = 32


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
