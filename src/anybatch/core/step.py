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

Under torch.export both are written out in torch's elementwise operations and means, which every runtime has; BatchNorm
with moments that are computed is more than most of them take.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .affine import normalise, normalise_backward, per_channel, through_moments
from .moments import compute_dtype, moments

__all__ = ["measure", "normalise_by", "shaped_as"]


def measure(y: Tensor, by_example: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` (N, C, *) itself, and its means and population variances: (1, C) over (N, *), or (N, C) over * alone."""
    if torch.compiler.is_exporting():
        return y, *_measure_written_out(y, by_example)
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
    if torch.compiler.is_exporting():
        return _normalise_written_out(y, mean, var, weight, bias, eps)
    out: Tensor = _Normalise.apply(y, mean, var, weight, bias, eps)  # type: ignore[no-untyped-call]
    return out


def _measure_written_out(y: Tensor, by_example: bool) -> tuple[Tensor, Tensor]:
    wide = y.to(compute_dtype(y.dtype))
    wide = wide.flatten(2) if y.dim() > 2 else wide.unsqueeze(2)
    var, mean = torch.var_mean(wide, [2] if by_example else [0, 2], correction=0)
    return (mean, var) if by_example else (mean[None], var[None])


def _normalise_written_out(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    out = (y - per_channel(mean, y)) * per_channel(torch.rsqrt(var + eps), y)
    out = out if weight is None else out * per_channel(weight.to(mean.dtype), y)
    out = out if bias is None else out + per_channel(bias.to(mean.dtype), y)
    return out.to(y.dtype)


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
        ctx.size = max(now.size, 1)
        # An alias and not a view: that would change the stride of a single example, which misleads torch's kernels.
        return torch.ops.aten.alias(y), mean, var

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
    def forward(
        ctx: Any, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        given = (mean, var, weight, bias)
        examples = max(len(t) if t is not None and t.dim() == 2 else 1 for t in given)
        flat = [None if t is None else _flat(t, examples).to(mean.dtype) for t in given]
        ctx.save_for_backward(y, *flat[:3])
        ctx.shapes, ctx.examples, ctx.eps = [None if t is None else t.shape for t in given], examples, eps
        return shaped_as(normalise(_rows(y, examples), *flat, eps), y)  # type: ignore[arg-type, call-arg]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, var, weight = ctx.saved_tensors
        grad, sums = normalise_backward(_rows(g, ctx.examples), _rows(y, ctx.examples), mean, var, weight, ctx.eps)
        by_mean = by_var = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            inverse = torch.rsqrt(var + ctx.eps)
            a = inverse if weight is None else weight * inverse
            by_mean, by_var = -a * sums.g, a.mul_(inverse).mul_(sums.g_y_hat).mul_(-0.5)
        grads = (by_mean, by_var, sums.g_y_hat, sums.g)
        wanted = zip(grads, ctx.shapes, ctx.needs_input_grad[1:5], strict=True)
        return (
            shaped_as(grad, y),
            *(_folded(t, shape, ctx.examples) if need else None for t, shape, need in wanted),
            None,
        )


def _flat(t: Tensor, examples: int) -> Tensor:
    """(C,) or (E, C) as the rows of ``examples`` examples: (examples * C,), contiguous as torch's kernels need it."""
    return (t if examples == 1 else t.expand(examples, t.shape[-1])).reshape(-1).contiguous()


def _folded(grad: Tensor | None, shape: torch.Size | None, examples: int) -> Tensor | None:
    """The gradient of what :func:`_flat` was given."""
    if grad is None or shape is None or grad.numel() == shape.numel():
        return grad if grad is None or shape is None else grad.view(shape)
    return grad.view(examples, -1).sum(0).view(shape)
