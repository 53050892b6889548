"""The exponential window where numbers are very small, rounded or not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.core.sampling import looks
from anybatch.nn import CrossIterationBatchNorm

from .test_cbn import D
from .tolerances import ORACLE


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-19, 1e-20, 1e-22, 1e-25])
def test_one_dead_channel_stops_no_other(scale: float) -> None:
    """Not the reciprocal of its variance, which would not be finite."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight[1] *= scale
    norm = CrossIterationBatchNorm(4).follows(conv)
    for _ in range(6):
        out = norm(conv(torch.randn(2, 3, 9, 9)))
        out.backward(torch.randn_like(out))
        assert torch.isfinite(conv.weight.grad).all()
    assert int(norm.num_batches_tracked) == int(norm.histories[0].forwards) == 6


def test_a_graph_outlives_a_batch_that_is_not_finite() -> None:
    """It keeps the covariance it was made with, through the bad batch and the next good one."""
    torch.manual_seed(0)
    grads = []
    for disturbed in (False, True):
        torch.manual_seed(1)
        conv = nn.Conv2d(3, 4, 3)
        norm = CrossIterationBatchNorm(4).follows(conv)
        for _ in range(3):
            norm(conv(torch.randn(2, 3, 9, 9))).sum().backward()
        conv.zero_grad()
        kept = norm(conv(torch.randn(2, 3, 9, 9)))
        if disturbed:
            norm(conv(torch.full((2, 3, 9, 9), torch.nan)))
            norm(conv(torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))))
        kept.backward(torch.randn(kept.shape, generator=torch.Generator().manual_seed(3)))
        grads.append(conv.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("positions", [16, None])
def test_outputs_rounded_in_half_precision_add_no_variance(positions: int | None) -> None:
    """At a mean of 310 deviations bfloat16 rounds by as much as the deviation; what carries leaves it out (1.39)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        conv.bias.fill_(200.0)
    norm = CrossIterationBatchNorm(8, positions=positions).follows(conv)
    for _ in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = norm(conv(torch.randn(4, 8, 12, 12)))
    # Weights that stand still carry nothing: the pooled variance is the batch's, to what 60 batches of 400 leave open.
    assert abs(float(out.detach().float().var()) - 1) < 0.1


def test_bfloat16_takes_no_window_that_it_cannot_move() -> None:
    ab.CBN(window=256, storage="bfloat16")
    with pytest.raises(ab.AnybatchError, match="window=257"):
        ab.CBN(window=257, storage="bfloat16")
    with pytest.raises(ab.AnybatchError, match="exponential"):
        ab.CBN(kind="ring", storage="bfloat16")


def layer_gradients(dtype: torch.dtype, batches: list[Tensor], positive: bool = False, **options: Any) -> list[Tensor]:
    """Of a convolution's weight, batch by batch."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, dtype=D).to(dtype)
    conv.weight.data = conv.weight.data.abs() if positive else conv.weight.data
    norm = CrossIterationBatchNorm(4, dtype=dtype, average_reductions=0, **options).follows(conv)
    generator, found = torch.Generator().manual_seed(1), []
    for x in batches:
        out = norm(conv(x.to(dtype)))
        cotangent = torch.randn(out.shape, dtype=D, generator=generator).to(dtype)
        found.append(torch.autograd.grad(out, conv.weight, cotangent)[0].to(D))
    return found


def assert_rounded(batches: list[Tensor], within: float, **options: Any) -> None:
    for got, exact in zip(*(layer_gradients(t, batches, **options) for t in (torch.float32, D)), strict=True):
        assert (got - exact).abs().max() <= within * exact.abs().max()


@pytest.mark.parametrize(("window", "refresh"), [(2, 2), (2, 24), (2, 64), (8, 64)])
def test_few_looks_at_a_short_past_lose_no_digits(window: int, refresh: int) -> None:
    """Yesterday's covariance is had from today's, of which a look after long must leave enough."""
    batches = [torch.randn(2, 3, 9, 9, dtype=D) for _ in range(2 * refresh + 1)]
    assert_rounded(batches, 1e-5, window=window, refresh=refresh)


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("positive", [True, False])
def test_a_constant_channel_comes_alive(refresh: int, positive: bool) -> None:
    """Of its past there is nothing but rounding.

    How much of that there may be is known by the mean; where the sum of the map cancels the mean says too little, and
    on some processors the first live batch has some per cent of one channel's gradient from rounding, if not all are
    looked at.
    """
    batches = [torch.full((2, 3, 17, 13), 0.3, dtype=D)] * 4 + [torch.randn(2, 3, 17, 13, dtype=D) for _ in range(3)]
    exact = layer_gradients(D, batches, positive, refresh=refresh)
    got = layer_gradients(torch.float32, batches, positive, refresh=refresh)
    for place, (a, b) in enumerate(list(zip(got, exact, strict=True))[4:]):
        rounding = not positive and refresh > 1 and place == 0
        assert (a - b).abs().max() <= (0.1 if rounding else 1e-4) * b.abs().max()


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 6])
def test_looks_leave_out_none_that_takes_turns(turns: int) -> None:
    """Once in every stretch, first of all at the first; each of the turns as often as any other, to a tenth."""
    for refresh in (2, 3, 4):
        at = [i for i in range(1200 * refresh) if looks(i, refresh)[1]]
        assert [i // refresh for i in at] == list(range(1200))
        assert at[0] == 0
        counts = [sum(i % turns == turn for i in at) for turn in range(turns)]
        assert max(counts) <= 1.1 * min(counts), (refresh, counts)
        numbers = torch.arange(50)
        assert [bool(looks(number, refresh)[1]) for number in numbers] == [i in at for i in range(50)]


def test_a_burn_in_keeps_float64() -> None:
    """No number on the way is a float32: what a burn-in of none gives and one that is over agree to rounding."""
    batches = [torch.randn(2, 3, 9, 9, dtype=D) for _ in range(5)]
    plain = layer_gradients(D, batches)
    after = layer_gradients(D, batches, burn_in_steps=1)
    for a, b in list(zip(after, plain, strict=True))[1:]:
        torch.testing.assert_close(a, b, **ORACLE)
