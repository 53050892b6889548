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
from .ranks import Group, rank_count, total

__all__ = ["Averages", "Batch", "Pooled", "normalise_pooled", "spread"]


class Batch(NamedTuple):
    """The current batch behind its map. K = 0 where there is no map to speak of.

    Of a batch spread over ranks, ``now`` is the whole batch's, and the parts of ``patch`` and ``covariance`` on the
    ranks add up to it.
    """

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


class Averages(NamedTuple):
    """Running averages of E[g] and E[g y_hat] of the unscaled loss, which every backward moves in place."""

    reductions: Tensor  # (2, C)
    backwards: Tensor  # () so many are in it
    over: int  # backwards
    loss_scale: Tensor | None = None  # what the loss is multiplied by


def normalise_pooled(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: Batch,
    pooled: Pooled,
    averages: Averages | None = None,
    group: Group = None,
    on_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Normalise y (N, C, *) by ``pooled`` moments; the equations above.

    Args:
        y: the map's output.
        weight: gamma (C,).
        bias: beta (C,).
        eps: inside the square root.
        batch: y's own moments and its map.
        pooled: the moments to normalise by.
        averages: give R1, R2; None leaves out 'later'.
        group: the ranks that the batch is spread over.
        on_backward: called once a backward.
    """
    # One tensor an argument: a compiler follows no others.
    size = batch.now.size
    sized = (None, size) if isinstance(size, Tensor) else (size, None)
    mapped = (batch.rows, batch.bias, batch.patch, batch.covariance) if batch.patch.numel() else [None] * 4
    by_map = [None] * 4 if mapped[0] is None else [*(pooled.by_weight or [None] * 2), *(pooled.by_bias or [None] * 2)]
    out: Tensor = _NormalisePooled.apply(  # type: ignore[no-untyped-call]
        *(y, weight, bias, *mapped, batch.now.mean, pooled.mean, pooled.var, pooled.share, *by_map),
        *(*sized, *(averages or (None, None, 0, None)), eps, group, on_backward),
    )
    return out


def average_(averages: Averages, new: Tensor) -> Tensor:
    """Take a backward's E[g], E[g y_hat] (2, C) into their averages, and give these at the same loss scale.

    The plain mean of the first ``over`` backwards, an exponential average with weight 1 / over from then on. A
    backward with a gradient that is not finite leaves them as they were.
    """
    scale = averages.loss_scale
    if scale is not None:
        new = new / scale
    ok = torch.isfinite(new.sum())
    averages.backwards.add_(ok)
    averages.reductions.add_(
        torch.where(ok, new - averages.reductions, 0.0) / averages.backwards.clamp(1, averages.over)
    )
    return averages.reductions.clone() if scale is None else averages.reductions * scale


class _NormalisePooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Tensor | None,
        map_bias: Tensor | None,
        patch: Tensor | None,
        covariance: Tensor | None,
        now_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        share: Tensor,
        mean_by_weight: Tensor | None,
        var_by_weight: Tensor | None,
        mean_by_bias: Tensor | None,
        var_by_bias: Tensor | None,
        size: int | None,
        size_of_ranks: Tensor | None,
        reductions: Tensor | None,
        backwards: Tensor | None,
        over: int,
        loss_scale: Tensor | None,
        eps: float,
        group: Group,
        on_backward: Callable[[], None] | None,
    ) -> Tensor:
        # Saved, and not kept as attributes: a loss that someone keeps after its backward then holds none of them.
        ctx.save_for_backward(
            *(y, weight, now_mean, patch, covariance, mean, var, share),
            *(mean_by_weight, var_by_weight, mean_by_bias, var_by_bias, size_of_ranks),
        )
        ctx.reductions, ctx.backwards, ctx.over, ctx.loss_scale = reductions, backwards, over, loss_scale
        ctx.size, ctx.eps, ctx.group, ctx.on_backward = size, eps, group, on_backward
        return normalise(y, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, now_mean, patch, covariance, mean, var, share, *by_map, size_of_ranks = ctx.saved_tensors
        mean_by_weight, var_by_weight, mean_by_bias, var_by_bias = by_map
        m = ctx.size if size_of_ranks is None else size_of_ranks
        if ctx.on_backward is not None:
            ctx.on_backward()
        grad_y, own = normalise_backward(g, y, mean, var, weight, ctx.eps)
        sums = own if ctx.group is None else Reductions(*total(torch.stack(own), ctx.group).unbind())

        inverse = torch.rsqrt(var + ctx.eps)
        a = inverse if weight is None else inverse * weight.to(inverse.dtype)
        by_mean = -a * sums.g
        by_var = -0.5 * a * inverse * sums.g_y_hat
        offset = share * (by_mean + 2 * by_var * (now_mean - mean)) / m
        slope = share * by_var * (2 / m)

        needs_rows, needs_bias = ctx.needs_input_grad[3:5]
        grad_rows = grad_bias = None
        ranks = rank_count(ctx.group)  # each has its part of the patches, and takes as much of what the bias gets
        if needs_rows and mean_by_weight is not None:
            grad_rows = torch.addcmul(spread(mean_by_weight, by_mean), var_by_weight, by_var.unsqueeze(1))
        if needs_bias and mean_by_bias is not None:
            grad_bias = (by_mean * mean_by_bias + by_var * var_by_bias) / ranks
        if ctx.over:
            averages = Averages(ctx.reductions, ctx.backwards, ctx.over, ctx.loss_scale)
            r1, r2 = average_(averages, torch.stack(sums) / m).unbind()
            # Without any share of its own the batch was normalised by constants, and nothing but a g flows.
            rest = a * (1 - share) * share.sign()
            later_slope = -rest * inverse * r2
            later_offset = -rest * r1 + later_slope * (now_mean - mean)
            if needs_rows:
                back = spread(patch, -m * later_offset)
                back.addcmul_(covariance, (-m * later_slope).unsqueeze(1))
                grad_rows = back if grad_rows is None else grad_rows.add_(back)
            if needs_bias:
                back = -m * later_offset / ranks
                grad_bias = back if grad_bias is None else grad_bias.add_(back)
            offset, slope = offset + later_offset, slope + later_slope
        if ctx.needs_input_grad[0]:
            grad_y = through_moments(grad_y, y, now_mean, slope, offset)
        grad_weight = own.g_y_hat if ctx.needs_input_grad[1] else None
        grad_beta = own.g if ctx.needs_input_grad[2] else None
        return grad_y, grad_weight, grad_beta, grad_rows, grad_bias, *[None] * 19


def spread(patch: Tensor, by_channel: Tensor) -> Tensor:
    """A patch (G, K) times (C,): (C, K), each channel taking its group's."""
    groups = patch.shape[0]
    return (by_channel.view(groups, -1, 1) * patch.unsqueeze(1)).flatten(0, 1)
