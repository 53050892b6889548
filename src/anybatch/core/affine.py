"""The normalise step, and its backward with an explicit share of the statistics' terms.

    out = gamma * y_hat + beta,   y_hat = (y - mean) / sqrt(var + eps)

Per channel (dim 1) of y (N, C, *). eps is inside the root, as in torch.nn.BatchNorm2d.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Reductions",
    "normalise",
    "normalise_backward",
    "per_channel",
    "reduce",
    "scale_and_shift",
    "through_moments",
]


class Reductions(NamedTuple):
    """The two sums over a batch that BatchNorm's backward needs, per channel."""

    g: Tensor  # (C,) sum of g
    g_y_hat: Tensor  # (C,) sum of g * y_hat


def per_channel(v: Tensor, y: Tensor) -> Tensor:
    """View a (C,) or (N, C) tensor so that it broadcasts over the positions of ``y``."""
    return v.view(-1, v.shape[-1], *[1] * (y.dim() - 2))


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Moments and affine parameters as one affine map: out = scale * y + shift, both (C,)."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def normalise(y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Out = weight * (y - mean) / sqrt(var + eps) + bias, per channel, with given moments."""
    if not y.numel():  # torch's kernels take no empty batch
        return torch.empty_like(y)
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return F.batch_norm(y, mean, var, weight, bias, False, 0.0, eps)


def normalise_backward(
    g: Tensor, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Reductions]:
    """Backward of :func:`normalise` with the moments held still, and the reductions that the moments' gradient needs.

    Returns:
        a * g with a = weight / sqrt(var + eps), and (sum g, sum g * y_hat), which are also the gradients of bias and
        weight.
    """
    if not y.numel():
        return g.to(y.dtype, copy=True), reduce(g, y, mean, var, eps)
    grad_y, grad_weight, grad_bias = _backward_kernel(g, y, mean, var, weight, eps, True)
    return grad_y, Reductions(grad_bias, grad_weight)


def reduce(g: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float) -> Reductions:
    """Sum g and sum g * y_hat per channel."""
    if not y.numel():
        # Made of g, empty as it is: a compiler would not leave in the backward what is sent there if it were constant.
        none = g.sum([d for d in range(g.dim()) if d != 1]).to(mean.dtype)
        return Reductions(none, none.clone())
    _, g_y_hat, g = _backward_kernel(g, y, mean, var, None, eps, False)
    return Reductions(g, g_y_hat)


def _backward_kernel(
    g: Tensor, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float, needs_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight = None if weight is None else weight.to(mean.dtype)
    g, y = _plain_stride(g), _plain_stride(y)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, y, weight, mean, var, None, None, False, eps, [needs_y, True, True]
    )
    return found


def _plain_stride(t: Tensor) -> Tensor:
    """A single example with the stride that torch's kernels expect: x[0][None] in channels_last misleads them."""
    if t.shape[0] != 1 or t.stride(0) == t.numel():
        return t
    return t.as_strided(t.shape, (t.numel(), *t.stride()[1:]))


def through_moments(
    grad: Tensor, y: Tensor, mean: Tensor, slope: Tensor, offset: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Scale * grad + slope * (y - mean) + offset, all but y and grad per channel: how the moments' gradient reaches y.

    In float32 or better, rounded once to the dtype of ``grad``: the sums of what comes out are to vanish.
    """
    if grad.dtype == y.dtype == mean.dtype and y.numel():  # normalise by a variance of one: one pass, not three
        change: Tensor = torch.ops.aten.native_batch_norm(
            _plain_stride(y), slope, offset, mean, torch.ones_like(mean), False, 0.0, 0.0
        )[0]
        return change.add_(grad) if scale is None else change.addcmul_(grad, per_channel(scale, y))
    mean, slope, offset = (per_channel(v, y) for v in (mean, slope, offset))
    change = (y.to(mean.dtype) - mean).mul_(slope).add_(offset)
    change = change.add_(grad) if scale is None else change.addcmul_(grad.to(mean.dtype), per_channel(scale, y))
    return change.to(grad.dtype)
