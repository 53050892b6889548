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

What W gets is linear in four numbers a channel, f = (dL/dmean, 2 dL/dvar, -m offset, -m slope); :class:`Response` says
by which patches and covariances.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .moments import Moments, remaining
from .passes import REFERENCE, Affine, Passes
from .ranks import Group, rank_count, total
from .tensors import finite

__all__ = ["Averages", "Map", "Pooled", "Response", "Rule", "add_spread_", "normalise_pooled", "spread"]


class Map(NamedTuple):
    """The map's weights today, attached."""

    rows: Tensor  # (C, *), flattened (C, K)
    bias: Tensor | None  # (C,)

    def held(self) -> tuple[Tensor, Tensor | None]:
        """W (C, K) and b, detached."""
        return self.rows.detach().flatten(1), None if self.bias is None else self.bias.detach()


class Response(NamedTuple):
    """What the map's weights get of f: with ``of, of_D, ..., of_b = answer(by, f)``, I patches and what is given,

        dL/dW = sum_i of_i patch_i + of_D covariance + of_second (second or sum_s left_s patch_(I+s)),   dL/db = of_b

    Of a batch spread over ranks the parts on the ranks add up to the whole.
    """

    patches: Tensor  # (I + S, G, K)
    covariance: Tensor  # (C, K)
    second: Tensor | None  # (C, K)
    left: Tensor | None  # (S, C)
    by: Sequence[Tensor | float | None]
    answer: Callable[[Sequence[Any], tuple[Tensor, Tensor, Tensor, Tensor]], Sequence[Tensor]]  # (I, C), then (C,) each


class Pooled(NamedTuple):
    """What one forward normalises by."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    share: Tensor | float  # of the current batch


class Rule(NamedTuple):
    """How batches are pooled.

    Args:
        kept: of the weight of all past batches, beside that of today's; what a ring keeps does not go by it.
        by_count: shares by the number of values; else every batch counts the same.
        second_moment: expand E[y^2] to first order; else the standard deviation.
        gradient: through the past too.
        group: ranks that the batches are spread over.
    """

    kept: Tensor | float
    by_count: bool = True
    second_moment: bool = False
    gradient: bool = True
    group: Group = None


class Averages(NamedTuple):
    """Running averages of E[g] and E[g y_hat] of the unscaled loss, which every backward moves in place."""

    reductions: Tensor  # (2, C)
    backwards: Tensor  # () so many are in it
    over: Tensor | float  # backwards
    loss_scale: Tensor | None = None  # what the loss is multiplied by


def normalise_pooled(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    now: Moments,
    pooled: Pooled,
    map: Map | None = None,
    response: Response | None = None,
    averages: Averages | None = None,
    group: Group = None,
    on_backward: Callable[[], None] | None = None,
    passes: Passes = REFERENCE,
) -> Tensor:
    """Normalise y (N, C, *) by ``pooled`` moments; the equations above.

    Args:
        y: the map's output.
        weight: gamma (C,).
        bias: beta (C,).
        eps: inside the square root.
        now: y's own moments, over all ranks.
        pooled: the moments to normalise by.
        map: what made y.
        response: what the map's weights get; None: nothing.
        averages: give R1, R2; None leaves out 'later'.
        group: the ranks that the batch is spread over.
        on_backward: called once a backward.
        passes: the implementation of what reads y.
    """
    # One tensor an argument: a compiler follows no others.
    mapped: Sequence[Tensor | None] = [None] * 6
    by: Sequence[Tensor | float | None] = ()
    answer = None
    if map is not None and response is not None:
        by, answer = response.by, response.answer
        mapped = [*map, *response[:4]]
    out: Tensor = _NormalisePooled.apply(  # type: ignore[no-untyped-call]
        *(y, weight, bias, *mapped, now.mean, pooled.mean, pooled.var),
        *((averages.reductions, averages.backwards, averages.loss_scale) if averages else (None,) * 3),
        *(eps, group, on_backward, passes, answer),
        *(pooled.share, now.size, averages and averages.over, *by),
    )
    return out


def average_(averages: Averages, new: Tensor, inverse: Tensor) -> Tensor:
    """Take a backward's E[g], E[g y_hat] (2, C) into their averages, and give these at the same loss scale.

    The plain mean of the first ``over`` backwards, an exponential average with weight 1 / over from then on. A
    backward with a gradient that is not finite leaves them as they were, and so does one through moments that were
    not: of those ``inverse``, 1 / sqrt(var + eps), is zero.

    Of B batches one after another ``new`` is (2, B C), and so is what is given: for each, the averages with it.
    """
    kept, backwards, over, scale = averages
    if new.shape[1] > kept.shape[1]:
        return _average_each_(averages, new, inverse)
    if scale is not None:
        new = new / scale
    ok = finite(new / inverse)
    backwards.add_(ok)
    if isinstance(ok, Tensor):
        kept.add_(torch.where(ok, new - kept, 0.0) / backwards.clamp_min(1).clamp_max(over))
    elif ok:
        kept.lerp_(new, 1 / min(backwards.item(), float(over)))
    return kept if scale is None else kept * scale


def _average_each_(averages: Averages, new: Tensor, inverse: Tensor) -> Tensor:
    kept, backwards, over, scale = averages
    apart = new.reshape(2, -1, kept.shape[1]).transpose(0, 1)  # (B, 2, C)
    if finite(new / inverse) is not True:
        each = zip(apart, inverse.view(len(apart), -1), strict=True)
        return torch.cat([average_(averages, part, its).clone() for part, its in each], 1)
    rates = [1 / min(backwards.item() + 1 + t, float(over)) for t in range(len(apart))]
    backwards.add_(len(apart))
    weights = remaining(rates, kept.device) * torch.tensor([1.0, *rates], dtype=torch.float64, device=kept.device)
    all_of_them = torch.cat([kept.unsqueeze(0), apart if scale is None else apart / scale])
    found: Tensor = torch.tensordot(weights[1:].to(kept.dtype), all_of_them, 1)
    kept.copy_(found[-1])
    found = found.transpose(0, 1).flatten(1)
    return found if scale is None else found * scale


class _NormalisePooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Tensor | None,
        map_bias: Tensor | None,
        patches: Tensor | None,
        covariance: Tensor | None,
        second: Tensor | None,
        left: Tensor | None,
        now_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        reductions: Tensor | None,
        backwards: Tensor | None,
        loss_scale: Tensor | None,
        eps: float,
        group: Group,
        on_backward: Callable[[], None] | None,
        passes: Passes,
        answer: Callable[..., Sequence[Tensor]] | None,
        *numbers: Tensor | float | None,
    ) -> Tensor:
        # Saved, and not kept as attributes: a loss that someone keeps after its backward then holds none of them.
        tensors = [v if isinstance(v, Tensor) else None for v in numbers]
        ctx.save_for_backward(y, weight, now_mean, mean, var, patches, covariance, second, left, *tensors)
        ctx.numbers = [None if isinstance(v, Tensor) else v for v in numbers]
        ctx.reductions, ctx.backwards, ctx.loss_scale = reductions, backwards, loss_scale
        ctx.answer, ctx.eps, ctx.group, ctx.on_backward = answer, eps, group, on_backward
        ctx.rows_shape = None if rows is None else rows.shape
        ctx.passes = passes
        return passes.normalise(y, Affine(mean, var, weight, bias, eps), False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, now_mean, mean, var, *saved = ctx.saved_tensors
        tensors = saved[:4]
        share, m, over, *by = (number if t is None else t for number, t in zip(ctx.numbers, saved[4:], strict=True))
        if ctx.on_backward is not None:
            ctx.on_backward()
        inverse = torch.rsqrt(var + ctx.eps)
        a = inverse if weight is None else inverse * weight.to(inverse.dtype)
        affine = Affine(mean, var, weight, None, ctx.eps, a)
        g, own = ctx.passes.reduce(g, y, affine, False)
        sums = total(torch.stack(own), ctx.group)  # (2, C) sum g, sum g y_hat

        down, apart = torch.stack([a, a * inverse]).neg_(), now_mean - mean
        of_mean, of_var = (sums * down).unbind()  # dL/dmean, 2 dL/dvar
        means = sums / m
        live: Tensor | float = 1.0
        if not isinstance(m, int) or m < 2:  # it may be normalised by constants, and nothing but a g flows
            live = share.sign() if isinstance(share, Tensor) else float(share > 0)
            of_mean, of_var = of_mean * live, of_var * live
        through = means * share  # E[g] and E[g y_hat] that y is answerable for: its share of its own,
        if over is not None:
            averages = Averages(ctx.reductions, ctx.backwards, over, ctx.loss_scale)
            later = average_(averages, means, inverse) * (1 - share) * live
            through = through + later  # and the rest of the average
            back_mean, back_var = (later * down).mul_(-m).unbind()
            back_mean = torch.addcmul(back_mean, back_var, apart)
        else:
            back_mean = back_var = torch.zeros_like(of_mean)

        grad_y = grad_rows = grad_bias = None
        if by and any(ctx.needs_input_grad[3:5]):
            of = ctx.answer(by, (of_mean, of_var, back_mean, back_var))
            if ctx.needs_input_grad[3]:
                grad_rows = of[0].new_empty(ctx.rows_shape)
                _write_grad(grad_rows.view(len(grad_rows), -1), of, *tensors)
            if ctx.needs_input_grad[4]:  # each rank has its part of the patches, and takes as much of the bias's
                grad_bias = of[-1] if ctx.group is None else of[-1] / rank_count(ctx.group)
        if ctx.needs_input_grad[0]:
            offset, slope = (through * down).unbind()
            offset = torch.addcmul(offset, slope, apart)
            grad_y = ctx.passes.input_gradient(g, y, affine, now_mean, slope, offset, False)
        grad_weight = own.g_y_hat if ctx.needs_input_grad[1] else None
        grad_beta = own.g if ctx.needs_input_grad[2] else None
        return grad_y, grad_weight, grad_beta, grad_rows, grad_bias, *[None] * (len(ctx.needs_input_grad) - 5)


def _write_grad(
    grad: Tensor, of: Sequence[Tensor], patches: Tensor, covariance: Tensor, second: Tensor | None, left: Tensor | None
) -> None:
    """Write to (C, K) what goes by each tensor of :class:`Response`, ``of`` them."""
    lefts, of_covariance, *rest = of
    if covariance.dtype == grad.dtype:
        torch.mul(covariance, of_covariance.unsqueeze(1), out=grad)
    else:
        grad.copy_(covariance).mul_(of_covariance.unsqueeze(1))
    if second is not None:
        grad.addcmul_(second, rest[0].unsqueeze(1))
    add_spread_(grad, lefts if left is None else torch.cat([lefts, left * rest[0]]), patches)


def add_spread_(to: Tensor, by_channel: Tensor, patches: Tensor) -> Tensor:
    """Add to (C, K), in place, patches (I, G, K) times (I, C), each channel taking its group's."""
    i, groups, k = patches.shape
    if i == groups == 1:  # several times as fast as the product of matrices
        return to.addcmul_(by_channel.t(), patches[0])
    if groups == 1:
        return to.addmm_(by_channel.t(), patches.squeeze(1))
    to.view(groups, -1, k).baddbmm_(by_channel.view(i, groups, -1).permute(1, 2, 0), patches.transpose(0, 1))
    return to


def spread(patch: Tensor, by_channel: Tensor) -> Tensor:
    """A patch (G, K) times (C,): (C, K), each channel taking its group's."""
    groups = patch.shape[0]
    return (by_channel.view(groups, -1, 1) * patch.unsqueeze(1)).flatten(0, 1)
