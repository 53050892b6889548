"""Normalising by pooled moments, and the gradient through them.

    out = gamma * y_hat + beta,   y_hat = (y - mean) / sqrt(var + eps)

where mean and var depend on the current batch y by its share s, and on the weights W of the map y = W p + b through the
carried moments of past batches. With a = gamma / sqrt(var + eps), E and m over the current batch:

    dL/dmean = -a sum g                          dL/dvar = -1/2 a / sqrt(var + eps) sum g y_hat
    dL/dmean_t = s (dL/dmean + 2 dL/dvar (mean_t - mean))      dL/dvar_t = s dL/dvar        (current batch)
    own:       dy = a g + dL/dmean_t / m + 2 dL/dvar_t (y - mean_t) / m
    history:   dL/dW += dL/dmean dmean/dW + dL/dvar dvar/dW    (and likewise b)
    later:     dy += (1 - s) a (-R1 - y_hat R2) = offset + slope (y - mean_t) for the layers before: what later batches
               will take from this one, estimated by averages R1, R2 of E[g], E[g y_hat]. W has its part by 'history'
               already, so this one is taken back there: dL/dW -= m (offset E[p] + slope E[(y - mean_t) p]).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .affine import Reductions, normalise, normalise_backward, through_moments
from .moments import Moments

__all__ = ["Average", "Batch", "Pooled", "normalise_pooled", "spread"]


class Batch(NamedTuple):
    """The current batch behind its map. K = 0 where there is no map to speak of."""

    now: Moments
    rows: Tensor  # (C, K) the map's weights today, attached
    bias: Tensor | None  # (C,) the map's bias, attached
    patch: Tensor  # (G, K) E[p]
    covariance: Tensor  # (C, K) E[(y - mean) p]


class Pooled(NamedTuple):
    """What one forward normalises by, and how that answers to the current batch and to today's weights."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    share: Tensor  # () of the current batch
    by_weight: tuple[Tensor, Tensor] | None  # d mean / dW (G, K), d var / dW (C, K), through the history
    by_bias: tuple[Tensor, Tensor] | None  # d mean / db (), d var / db (C,)


# Called once a backward with (sum g, sum g y_hat) and m; gives the averages R1, R2 of E[g], E[g y_hat], or None.
Average = Callable[[Reductions, int], tuple[Tensor, Tensor] | None]


def normalise_pooled(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: Batch,
    pooled: Pooled,
    average: Average,
) -> Tensor:
    """Normalise y (N, C, *) by ``pooled`` moments; the equations above.

    Args:
        y: the map's output.
        weight: gamma (C,).
        bias: beta (C,).
        eps: inside the square root.
        batch: y's own moments and its map.
        pooled: the moments to normalise by.
        average: gives R1, R2, or None to leave out 'later'; called once a backward.
    """
    out: Tensor = _NormalisePooled.apply(  # type: ignore[no-untyped-call]
        y, weight, bias, batch.rows, batch.bias, eps, batch, pooled, average
    )
    return out


class _NormalisePooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Tensor,
        map_bias: Tensor | None,
        eps: float,
        batch: Batch,
        pooled: Pooled,
        average: Average,
    ) -> Tensor:
        # Saved, and not kept as attributes: a loss that someone keeps after its backward then holds none of them.
        mean_by_weight, var_by_weight = pooled.by_weight or (None, None)
        mean_by_bias, var_by_bias = pooled.by_bias or (None, None)
        ctx.save_for_backward(
            *(y, weight, batch.now.mean, batch.patch, batch.covariance, pooled.mean, pooled.var, pooled.share),
            *(mean_by_weight, var_by_weight, mean_by_bias, var_by_bias),
        )
        ctx.m, ctx.average, ctx.eps = batch.now.size, average, eps
        return normalise(y, pooled.mean, pooled.var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, now_mean, patch, covariance, mean, var, share, *by_map = ctx.saved_tensors
        mean_by_weight, var_by_weight, mean_by_bias, var_by_bias = by_map
        m = ctx.m
        grad_y, sums = normalise_backward(g, y, mean, var, weight, ctx.eps)

        inverse = torch.rsqrt(var + ctx.eps)
        a = inverse if weight is None else inverse * weight.to(inverse.dtype)
        by_mean = -a * sums.g
        by_var = -0.5 * a * inverse * sums.g_y_hat
        offset = share * (by_mean + 2 * by_var * (now_mean - mean)) / m
        slope = share * by_var * (2 / m)

        needs_rows, needs_bias = ctx.needs_input_grad[3] and patch.numel() > 0, ctx.needs_input_grad[4]
        grad_rows = grad_bias = None
        if needs_rows and mean_by_weight is not None:
            grad_rows = torch.addcmul(spread(mean_by_weight, by_mean), var_by_weight, by_var.unsqueeze(1))
        if needs_bias and mean_by_bias is not None:
            grad_bias = by_mean * mean_by_bias + by_var * var_by_bias
        averages = ctx.average(sums, m)
        if averages is not None:
            r1, r2 = averages
            # Without any share of its own the batch was normalised by constants, and nothing but a g flows.
            rest = a * (1 - share) * share.sign()
            later_slope = -rest * inverse * r2
            later_offset = -rest * r1 + later_slope * (now_mean - mean)
            if needs_rows:
                back = spread(patch, -m * later_offset)
                back.addcmul_(covariance, (-m * later_slope).unsqueeze(1))
                grad_rows = back if grad_rows is None else grad_rows.add_(back)
            if needs_bias:
                back = -m * later_offset
                grad_bias = back if grad_bias is None else grad_bias.add_(back)
            offset, slope = offset + later_offset, slope + later_slope
        if ctx.needs_input_grad[0]:
            grad_y = through_moments(grad_y, y, now_mean, slope, offset)
        grad_weight = sums.g_y_hat if ctx.needs_input_grad[1] else None
        grad_beta = sums.g if ctx.needs_input_grad[2] else None
        return grad_y, grad_weight, grad_beta, grad_rows, grad_bias, None, None, None, None


def spread(patch: Tensor, by_channel: Tensor) -> Tensor:
    """A patch (G, K) times (C,): (C, K), each channel taking its group's."""
    groups = patch.shape[0]
    return (by_channel.view(groups, -1, 1) * patch.unsqueeze(1)).flatten(0, 1)
