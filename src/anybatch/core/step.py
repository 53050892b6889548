"""A normalization in three differentiable parts: measure, decide, normalise.

    y, mean, var = measure(y)                      moments of y, per channel or per example and channel
    mean, var = ...                                small tensors: any function of moments, parameters and past
    out = normalise_by(y, mean, var, w, b, eps)    w * (y - mean) / sqrt(var + eps) + b

What lies between is ordinary torch, differentiated by autograd. Moments have the shape (E, C): E = 1 for the whole
batch, E = N for every example by itself. Backward, with y_hat = (y - mean) / sqrt(var + eps), a = w / sqrt(var + eps),
m values to a moment and sums over these:

    normalise_by:  dy = a g,  dmean = -a sum g,  dvar = -1/2 a / sqrt(var + eps) sum g y_hat,
                   dw = sum g y_hat,  db = sum g
    measure:       dy = (what flows to the y it gave back) + dmean / m + 2 dvar (y - mean) / m

``measure`` gives y back so that both gradients of y meet in one pass over it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .affine import normalise, normalise_backward, through_moments
from .moments import moments

__all__ = ["measure", "normalise_by", "shaped_as"]


def measure(y: Tensor, by_example: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` (N, C, *) itself, and its means and population variances: (1, C) over (N, *), or (N, C) over * alone."""
    same, mean, var = _Measure.apply(y, by_example)  # type: ignore[no-untyped-call]
    return same, mean, var


def normalise_by(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``weight * (y - mean) / sqrt(var + eps) + bias``, differentiable in every argument.

    Args:
        y: (N, C, *).
        mean: (E, C), E = 1 or N, as :func:`measure` gives it; what else is given broadcasts to (N, C).
        var: likewise.
        weight: (C,), (1, C) or (N, C); None for ones.
        bias: likewise; None for zeros.
        eps: inside the square root.
    """
    weight = mean.new_ones(()) if weight is None else weight.to(mean.dtype)
    bias = mean.new_zeros(()) if bias is None else bias.to(mean.dtype)
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, var, weight, bias)))  # type: ignore[no-untyped-call]
    mean, var, weight, bias = (t.expand(shape) for t in (mean, var, weight, bias))
    out: Tensor = _Normalise.apply(y, mean, var, weight, bias, eps)  # type: ignore[no-untyped-call]
    return out


def _rows(y: Tensor, examples: int) -> Tensor:
    """``y`` as one batch whose channels are the rows of (E, C) moments: itself, or (1, N * C, *)."""
    return y if examples == 1 else y.reshape(1, -1, *(y.shape[2:] or (1,)))


def shaped_as(out: Tensor, y: Tensor) -> Tensor:
    """``out`` in the shape and memory format of ``y``, whose values it has in contiguous order if its shape differs."""
    if out.shape == y.shape:
        return out
    out = torch.ops.aten._unsafe_view(out, y.shape)  # a view made in a Function may not be changed in place later
    return out if y.is_contiguous() else torch.empty_like(y).copy_(out)


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, by_example: bool) -> tuple[Tensor, Tensor, Tensor]:
        examples = y.shape[0] if by_example else 1
        now = moments(_rows(y, examples))
        mean, var = now.mean.view(examples, -1), now.var.view(examples, -1)
        ctx.save_for_backward(y, mean)
        ctx.size = now.size
        return y.view_as(y), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, by_mean: Tensor, by_var: Tensor) -> tuple[Tensor, None]:
        y, mean = ctx.saved_tensors
        examples = len(mean)
        rows = _rows(y, examples)
        offset, slope = (by_mean / ctx.size).flatten(), (by_var * (2 / ctx.size)).flatten()
        return shaped_as(through_moments(_rows(g, examples), rows, mean.flatten(), slope, offset), y), None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, var, weight, bias = (t.contiguous() for t in (mean, var, weight, bias))
        ctx.save_for_backward(y, mean, var, weight)
        ctx.eps = eps
        rows = _rows(y, len(mean))
        return shaped_as(normalise(rows, mean.view(-1), var.view(-1), weight.view(-1), bias.view(-1), eps), y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, var, weight = ctx.saved_tensors
        examples = len(mean)
        grad, sums = normalise_backward(
            _rows(g, examples), _rows(y, examples), mean.view(-1), var.view(-1), weight.view(-1), ctx.eps
        )
        by_bias, by_weight = (t.view_as(mean) for t in sums)
        inverse = torch.rsqrt(var + ctx.eps)
        a = weight * inverse
        return shaped_as(grad, y), -a * by_bias, -0.5 * a * inverse * by_weight, by_weight, by_bias, None
