"""The passes through the operators that torch's SyncBatchNorm is made of, for CUDA without Triton.

    batch_norm_update_stats       mean, var                      two-pass within a thread block, Welford across
    batch_norm_elemt              (y - mean) invstd weight + bias
    batch_norm_backward_reduce    sum g,  sum g (y - mean)
    batch_norm_backward_elemt     (g - A / n - (y - centre) invstd^2 B / n) invstd weight,   n the sum of ``count``

The last is dy = a g + slope (y - centre) + offset for n = 1, A = -offset / a, B = -slope / (a invstd^2). Bytes a value
in float32 (half precision: half of it): 4, 8, 8, 12; where a ReLU follows, its backward computes the output again, 20
more. They exist on CUDA alone. Not measured on a GPU yet.
"""

import torch
from torch import Tensor

from ..core.affine import Reductions
from ..core.moments import Moments
from ..core.passes import Affine, Passes, dense, dense_like

__all__ = ["ATEN"]

aten = torch.ops.aten


def _moments(y: Tensor) -> Moments:
    # Not batch_norm_stats: a variance far below eps does not come back out of 1 / sqrt(var + eps).
    mean, var = aten.batch_norm_update_stats(y, None, None, 0.0)
    return Moments(mean, var, y.numel() // y.shape[1])


def _inverse_and_parameters(affine: Affine) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """1 / sqrt(var + eps), weight and bias, all of one dtype as the operators want them."""
    mean, var, weight, bias, eps, _ = affine
    return torch.rsqrt(var + eps), *(None if p is None else p.to(mean.dtype) for p in (weight, bias))  # type: ignore[return-value]


def _alike(y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one memory format: the operators look at that of one of them and read the other by it."""
    y, channels_last = dense(y)
    return y, dense_like(g, channels_last)


def _normalise(y: Tensor, affine: Affine, relu: bool) -> Tensor:
    inverse, weight, bias = _inverse_and_parameters(affine)
    out: Tensor = aten.batch_norm_elemt(y, weight, bias, affine.mean, inverse, affine.eps)
    return out.relu_() if relu else out


def _reduce(g: Tensor, y: Tensor, affine: Affine, relu: bool) -> tuple[Tensor, Reductions]:
    inverse, weight, _ = _inverse_and_parameters(affine)
    y, g = _alike(y, g)
    if relu:
        g = aten.threshold_backward(g, _normalise(y, affine, False), 0)
    sum_g, sum_g_dy, _, _ = aten.batch_norm_backward_reduce(g, y, affine.mean, inverse, weight, True, False, False)
    return g, Reductions(sum_g, sum_g_dy * inverse)


def _input_gradient(
    g: Tensor, y: Tensor, affine: Affine | None, centre: Tensor, slope: Tensor, offset: Tensor, relu: bool
) -> Tensor:
    y, g = _alike(y, g)
    one = torch.ones(1, dtype=torch.int32, device=y.device)
    if affine is None:
        inverse, weight = torch.ones_like(centre), None
        a = inverse
    else:
        inverse, weight, _ = _inverse_and_parameters(affine)
        a = inverse if weight is None else weight * inverse
        a = torch.where(a == 0, 1.0, a)  # slope and offset are zero there
    slope, offset = slope.to(a.dtype), offset.to(a.dtype)
    grad: Tensor = aten.batch_norm_backward_elemt(
        g, y, centre, inverse, weight, -offset / a, -slope / (a * inverse.square()), one
    )
    return grad


ATEN = Passes(_moments, _normalise, _reduce, _input_gradient)
