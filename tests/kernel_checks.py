"""What every implementation of the passes is held to: core's reference in float64, and autograd of BatchNorm."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from anybatch.core.passes import REFERENCE, Affine, Passes

from .tolerances import HALF, REORDERED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One value a channel, one channel, one position; no multiple of a tile; more channels than a tile; several tiles.
SHAPES = [(1, 1), (1, 5), (3, 1, 1, 1), (2, 3, 7, 5), (4, 70, 3), (2, 2, 40, 70), (1, 3, 2, 3, 5), (1, 1, 9001)]

shapes = st.one_of(
    st.sampled_from(SHAPES),
    st.builds(
        lambda n, c, s: (n, c, *s), st.integers(1, 3), st.integers(1, 20), st.lists(st.integers(1, 9), max_size=3)
    ),
)
options = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "last": st.booleans(),
        "g_last": st.booleans(),
        "relu": st.booleans(),
        "weight": st.sampled_from([None, *DTYPES]),
        "bias": st.sampled_from([None, torch.float32]),
    }
)


def channels_last(t: Tensor) -> Tensor:
    """The same values, channels innermost."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def check_parity(
    passes: Passes,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    g_last: bool = False,
    relu: bool = False,
    weight: torch.dtype | None = torch.float32,
    bias: torch.dtype | None = torch.float32,
    seed: int = 0,
) -> None:
    """The four passes against the reference on the same values in float64; sums of n values in units of their size."""
    torch.manual_seed(seed)
    y, g = ((torch.randn(shape) * 2 + 1).to(dtype), torch.randn(shape).to(dtype))
    c, m = shape[1], y.numel() // shape[1]
    w, b = (None if kind is None else torch.randn(c).to(kind) for kind in (weight, bias))
    if w is not None:
        w[0] = 0
    affine = Affine(torch.randn(c), torch.rand(c) + 0.5, w, b, 1e-3)
    exact = Affine(*(None if t is None else t.double() for t in affine[:4]), affine.eps)
    a = torch.rsqrt(affine.var + affine.eps) * (1 if w is None else w.float())
    centre, slope, offset = torch.randn(c), torch.randn(c) * a, torch.randn(c) * a
    out = REFERENCE.normalise(y.double(), exact, False)
    g[out.abs() < 1e-2] = 0  # at the kink of a ReLU rounding decides
    y, g = channels_last(y) if last else y, channels_last(g) if g_last else g
    near = HALF.get(dtype, REORDERED)

    now, wanted = passes.moments(y), REFERENCE.moments(y.double())
    assert now.size == m
    for mine, right in zip(now[:2], wanted[:2], strict=True):
        torch.testing.assert_close(mine, right.float(), **REORDERED)

    mine = passes.normalise(y, affine, relu)
    assert mine.dtype == dtype
    assert mine.movedim(1, -1).is_contiguous() or not last
    torch.testing.assert_close(mine.double(), out.relu() if relu else out, **near)

    handed, sums = passes.reduce(g, y, affine, relu)
    handed_exact, exact_sums = REFERENCE.reduce(g.double(), y.double(), exact, relu)
    for mine, right in zip(sums, exact_sums, strict=True):
        torch.testing.assert_close(mine.double() / m, right / m, **REORDERED)

    rest = (centre, slope, offset)
    for given_by, exact_by, of, right_of in ((affine, exact, handed, handed_exact), (None, None, g, g.double())):
        mine = passes.input_gradient(of, y, given_by, *rest, relu and given_by is not None)
        right = REFERENCE.input_gradient(right_of, y.double(), exact_by, *(t.double() for t in rest), relu)
        assert mine.dtype == dtype
        assert mine.shape == y.shape
        torch.testing.assert_close(mine.double(), right, **near)


def check_batch_norm(passes: Passes, relu: bool) -> None:
    """The passes put together as BatchNorm, every gradient, against float64 autograd."""
    torch.manual_seed(1)
    y, g, w, b = torch.randn(3, 4, 5, 6) * 2 + 3, torch.randn(3, 4, 5, 6), torch.randn(4), torch.randn(4)
    leaves = [t.double().requires_grad_() for t in (y, w, b)]
    right = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, 1e-5)
    right = right.relu() if relu else right
    grads = torch.autograd.grad(right, leaves, g.double())

    mean, var, m = passes.moments(y)
    affine = Affine(mean, var, w, b, 1e-5)
    handed, sums = passes.reduce(g, y, affine, relu)
    inverse = torch.rsqrt(var + affine.eps)
    slope, offset = -w * inverse * inverse * sums.g_y_hat / m, -w * inverse * sums.g / m
    grad_y = passes.input_gradient(handed, y, affine, mean, slope, offset, relu)
    mine = [passes.normalise(y, affine, relu), grad_y, sums.g_y_hat, sums.g]
    for t, wanted in zip(mine, [right, *grads], strict=True):
        torch.testing.assert_close(t, wanted.float(), **REORDERED)


def check_large_mean(passes: Passes) -> None:
    """At mean 1e4 the variance is still one, with all its digits."""
    torch.manual_seed(2)
    y = torch.randn(2, 3, 70, 50) + 1e4
    now, right = passes.moments(y), REFERENCE.moments(y.double())
    torch.testing.assert_close(now.var.double(), right.var, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(now.mean.double(), right.mean, rtol=2.5e-7, atol=0.0)


def check_not_finite(passes: Passes) -> None:
    """A NaN stays one, behind a ReLU too, and in its own channel."""
    y, g = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    y[1, 2, 3] = torch.nan
    affine = Affine(torch.zeros(3), torch.ones(3), None, None, 0.0)
    assert passes.moments(y).mean.isnan().tolist() == [False, False, True]
    assert passes.normalise(y, affine, True).isnan().sum() == 1
    handed, sums = passes.reduce(g, y, affine, True)
    assert sums.g_y_hat.isnan().tolist() == [False, False, True]
    grad = passes.input_gradient(handed, y, affine, *torch.ones(3, 3), True)
    assert grad.isnan().nonzero().tolist() == [[1, 2, 3]]


def check_strides(passes: Passes) -> None:
    """Slices, an example taken out of a channels_last batch, a gradient that is expanded."""
    torch.manual_seed(3)
    affine = Affine(torch.randn(4), torch.rand(4) + 0.5, None, None, 1e-5)
    whole = torch.randn(3, 8, 6, 6)
    for y in (whole[:, ::2], whole[:, :4, 1:, 2:], channels_last(whole)[1][None][:, 2:6], whole.transpose(2, 3)[:, :4]):
        g = torch.randn(1, 4, 1, 1).expand_as(y)
        now = passes.moments(y)
        torch.testing.assert_close(now.var, REFERENCE.moments(y.contiguous()).var, **REORDERED)
        mine, right = (
            (
                p.normalise(t, affine, False),
                p.input_gradient(p.reduce(u, t, affine, False)[0], t, affine, *centre, False),
            )
            for p, t, u, centre in (
                (passes, y, g, torch.ones(3, 4)),
                (REFERENCE, y.contiguous(), g.contiguous(), torch.ones(3, 4)),
            )
        )
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, **REORDERED)
