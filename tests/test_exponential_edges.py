"""The exponential window where numbers are very small, rounded or not finite."""

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm


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
    with pytest.raises(ab.AnybatchError, match="up to 256"):
        ab.CBN(window=257, storage="bfloat16")
    with pytest.raises(ab.AnybatchError, match="exponential"):
        ab.CBN(kind="ring", storage="bfloat16")
