"""Moments pooled over all past batches with exponentially falling shares, in the memory of one.

Batch t, of n_t values a channel, counts c_t = n_t lambda_(t+1) ... lambda_now, lambda = 1 - 1/k: of batches of one size
the newest has the share 1/k, as in a window of k. A window of N examples has k = N / n for a batch of n of them. Of the
past are kept C = sum c, its mean and variance (spread between batches included) and, over the positions that were
looked at (core/sampling.py),

    P = E[p],   mean_at = <P, W_t> + b_t,   D = E[(y - E[y]) (p - E[p])],   var_at = <D, W_t>

with W_t, b_t the weights they were last read with. At today's weights, with r = <D, W> / var_at:

    'deviation':      mean(W) = <P, W> + b + r (mean - mean_at),   var(W) = r^2 var
    'second_moment':  mean(W) = <P, W> + b +   (mean - mean_at),
                      var(W) = max(var + 2 (<D, W> - var_at) - (mean(W) - mean)^2, 0)

Today's batch, with share s = n / (lambda C + n), then makes with d = mean(W) - mean_t

    mean = mean_t + (1 - s) d,    var = (1 - s) var(W) + s (var_t + (1 - s) d^2)

and P, D, mean_at, var_at likewise of the positions, where it is looked at these, with the share of all that came since
the last look. While weights stand still this is BatchNorm on the batches' weighted concatenation. Beside the sum over
batches of what core/taylor.py makes of each, with these shares, the mean is the same and the variance is off by the
second order: it is expanded from step to step, and of all batches together.

Mean and variance are true moments; the positions say only how these change. In 'deviation' both are blind to the scale
of W whatever positions were seen: <dvar/dW, W> = 2 var(W) and <dmean/dW, W> = mean(W) - b, exactly, by

    dmean/dW = P + (mean - mean_at) D / var_at,     dvar/dW = 2 r var D / var_at

Letters: C channels, G groups, K values of a patch, S positions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .answer import TIMES, By, answer, answer_unseen
from .moments import Moments, blend
from .pooled import Pooled, Response, Rule, add_spread_
from .ranks import total
from .sampling import Seen
from .taylor import by_patch
from .tensors import at_hand, finite

__all__ = ["Past", "advance", "carry", "count", "inverse", "renew", "without_map"]


class Past(NamedTuple):
    """All batches so far. Of a batch spread over ranks each has its part of ``patch`` and ``covariance``."""

    sizes: Tensor  # (2,) C now, and what is left of C as it was at the last look
    mean: Tensor  # (C,)
    var: Tensor  # (C,) population
    mean_at: Tensor  # (C,) <P, W_t> + b_t, at the weights of the last batch
    var_at: Tensor  # (C,) <D, W_t>
    per: Tensor  # (C,) 1 / var_at, or zero: see :func:`inverse`
    patch: Tensor  # (G, K) P
    covariance: Tensor  # (C, K) D, float32 or better, or bfloat16


class _Carried(NamedTuple):
    """The past at today's weights."""

    mean: Tensor
    var: Tensor
    mean_at: Tensor  # <P, W> + b
    var_at: Tensor  # <D, W>
    mean_by: Tensor | None  # dmean/dW = P + mean_by D; None: zero
    var_by: Tensor  # 1/2 dvar/dW = var_by D + var_by_patch P
    var_by_patch: Tensor | None


def advance(
    past: Past,
    now: Moments,
    seen: Seen | None,
    rows: Tensor,
    bias: Tensor | None,
    rule: Rule,
    used: Tensor | None = None,
    part: Tensor | None = None,
    take: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Pooled, Response | None, Past, Tensor | bool]:
    """Pool a batch with the past.

    Args:
        past: all batches so far.
        now: the batch's moments, over all ranks.
        seen: of this rank's part of it, relative to ``now.mean``; None: its positions are not looked at.
        rows: W (C, K); K = 0 where there is no map to speak of.
        bias: b (C,).
        rule: how.
        used: a bool on the device, False: normalise by the batch alone, take it in all the same.
        part: this rank's share of the batch's values, if it has not all.
        take: a bool on the device, False: leave the past as it was.
        in_place: write today's D over yesterday's.

    Returns:
        What to normalise by; how that answers to the map, None without one; the past with this batch in it, or as it
        was if the batch's moments are not finite; and whether they are.
    """
    n = now.size if rule.by_count else (now.size.sign() if isinstance(now.size, Tensor) else 1)
    looked = False if seen is None else seen.looked
    sizes, s, at = count(past.sizes, rule.kept, n, looked)
    if not rows.shape[1]:
        mean, var = blend(past.mean, past.var, now.mean, now.var, s)
        ok = _good(now, take, mean, var)
        sizes, kept, kept_var = _where(ok, (sizes, mean, var), past)
        return _pooled(mean, var, s, now, used), None, without_map(past, sizes, kept, kept_var), ok
    carried, own = carry(past, seen, rows, bias, part, rule)
    mean, var = blend(carried.mean, carried.var, now.mean, now.var, s)
    # Without a look it is as if the batch's positions were those of the past.
    mean_at, var_at, offset, rest = carried.mean_at, carried.var_at, carried.mean_at - now.mean, now.var
    apart = lean = None
    if own is not None and seen is not None:
        seen_offset, scatter = own
        offset, rest = _where(looked, (seen_offset, now.var - scatter), (offset, rest))
        lean = None if part is None else (seen.offset - seen_offset) * looked
        today = now.mean + offset
        apart = (today - mean_at) * (1 - at)
        mean_at, var_at = blend(mean_at, var_at, today, scatter, at)
    gap = (carried.mean - now.mean) * s
    gap = gap if carried.var_by_patch is None else gap + carried.var_by_patch
    through = float(rule.gradient) if used is None else used.to(mean.dtype) * float(rule.gradient)
    of_carried = carried.mean_by, carried.var_by, gap
    per = inverse(var_at, var, mean)
    by = By(s, at, through, *of_carried, apart, lean, offset, rest, per)
    ok = _good(now, take, mean + mean_at, var + var_at)
    pooled = _pooled(mean, var, s, now, used)
    new = Past._make((*_where(ok, (sizes, mean, var, mean_at, var_at, per), past), past.patch, past.covariance))
    if seen is None or apart is None:
        response = Response(past.patch.unsqueeze(0), past.covariance, None, None, by, answer_unseen)
        return pooled, response, new, ok
    patch, left, second = seen.patch, seen.left, seen.covariance
    if part is not None:
        patch, left, second = patch * part, left * part, None if second is None else second * part
    patch, left, second = _where(looked, (patch, left, second), (past.patch, 0.0, 0.0))
    patches = torch.cat([past.patch.unsqueeze(0), patch.unsqueeze(0), seen.right])
    if ok is not False:
        lefts = torch.cat([torch.stack([-apart, apart if lean is None else apart + lean]), left]) * at
        whole = None if second is None else second * at
        keep, lefts, right, whole = _where(ok, (1 - at, lefts, patches, whole), (1.0, 0.0, 0.0, 0.0))
        covariance = renew(past.covariance, keep, lefts, right, whole, in_place)
        new = new._replace(patch=_where(ok, [past.patch.lerp(patch, at)], [past.patch])[0], covariance=covariance)
    return pooled, Response(patches, new.covariance, second, None if second is not None else left, by, answer), new, ok


def without_map(past: Past, sizes: Tensor, mean: Tensor, var: Tensor) -> Past:
    """The past of a norm behind no map: nothing reads what the others say of its positions."""
    return past._replace(sizes=sizes, mean=mean, var=var, mean_at=mean, var_at=mean, per=mean)


def count(
    sizes: Tensor, kept: Tensor | float, n: Tensor | float, looked: Tensor | bool
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """C with a batch of n in it, and what is left of C as of the last look; what share is newer than either.

    The second no more than 1 - (1 - s) / 8: the gradient needs yesterday's D, which is what today's leaves of it.
    """
    if at_hand(sizes) and not isinstance(n, Tensor) and not isinstance(kept, Tensor) and isinstance(looked, bool):
        numbers, *shares = count_numbers(sizes.tolist(), kept, n, looked)
        return sizes.new_tensor(numbers), shares[0], shares[1]
    whole, seen = (sizes * kept).unbind()
    whole = whole + n
    least = whole.clamp_min(1)
    s = n / least
    at = torch.minimum(1 - seen / least, 1 - (1 - s) / TIMES) * looked
    new = torch.stack([whole, torch.where(torch.as_tensor(looked, device=whole.device), whole, seen)])
    return (new, s.item(), at.item()) if at_hand(s) else (new, s, at)


def count_numbers(sizes: list[float], kept: float, n: float, looked: bool) -> tuple[list[float], float, float]:
    """:func:`count` of what lies at hand."""
    whole, seen = (size * kept for size in sizes)
    whole += n
    s = n / whole
    seen, at = (whole, min(1 - seen / whole, 1 - (1 - s) / TIMES)) if looked else (seen, 0.0)
    return [whole, seen], s, at


def _pooled(mean: Tensor, var: Tensor, s: Tensor | float, now: Moments, used: Tensor | None) -> Pooled:
    if used is None:
        return Pooled(mean, var, s)
    mean, var, share = _where(
        used, (mean, var, torch.as_tensor(s, dtype=mean.dtype, device=mean.device)), (now.mean, now.var, 1.0)
    )
    return Pooled(mean, var, share)


def _good(now: Moments, take: Tensor | None, means: Tensor, variances: Tensor) -> Tensor | bool:
    """Whether a batch is to be taken in."""
    ok = finite(means + variances)
    if isinstance(now.size, Tensor):
        ok = bool(now.size > 0) and ok if isinstance(ok, bool) else ok & (now.size > 0)
    return ok if take is None else ok & take


def carry(
    past: Past, seen: Seen | None, rows: Tensor, bias: Tensor | None, part: Tensor | None, rule: Rule
) -> tuple[_Carried, tuple[Tensor, Tensor] | None]:
    """The past at today's weights; mean (less the reference) and variance of the positions seen on all ranks."""
    mean_at = by_patch(past.patch.unsqueeze(1), rows)[:, 0]
    var_at = torch.linalg.vecdot(past.covariance.to(rows.dtype), rows)
    own = None if seen is None else (seen.offset, _scatter(seen, rows))
    if part is not None:
        parts = [mean_at, var_at]
        if own is not None:
            parts += [own[0] * part, torch.addcmul(own[1], own[0], own[0]) * part]
        mean_at, var_at, *sums = total(torch.stack(parts), rule.group).unbind()
        own = (sums[0], sums[1] - sums[0].square()) if sums else None
    if bias is not None:
        mean_at = mean_at + bias
    apart = past.mean - past.mean_at
    if rule.second_moment:
        mean = mean_at + apart
        delta = mean - past.mean
        var = past.var + 2 * (var_at - past.var_at) - delta.square()
        live = (var > 0).to(var.dtype)
        return _Carried(mean, var.clamp_min(0), mean_at, var_at, None, live, -live * delta), own
    ratio = (var_at - past.var_at) * past.per + 1
    slope = ratio * past.var
    mean, var = torch.addcmul(mean_at, apart, ratio), slope * ratio
    return _Carried(mean, var, mean_at, var_at, apart * past.per, slope * past.per, None), own


def _scatter(seen: Seen, rows: Tensor) -> Tensor:
    """The variance of the positions seen; of what a map in half precision has rounded, without the rounding's."""
    if seen.spread is not None:
        return seen.spread
    if seen.covariance is not None:
        by_whole: Tensor = torch.linalg.vecdot(seen.covariance, rows)
        return by_whole
    by_positions: Tensor = torch.linalg.vecdot(seen.left.t(), by_patch(seen.right.transpose(0, 1), rows))
    return by_positions


def inverse(var_at: Tensor, var: Tensor, mean: Tensor) -> Tensor:
    """1 / var_at, or zero where the positions have seen too little of the variance to say how it changes.

    So they have where there is no more of it than rounding of the mean makes; of a sum that cancels the mean says too
    little of that, so that a channel that was constant may have some per cent of its first live gradient from rounding.
    """
    rounding = 64 * torch.finfo(mean.dtype).eps ** 2
    # Literals: a compiler asked for dynamic sizes takes a global number for one of them.
    # Below 1e-30 eps is all there is, and one weak channel's reciprocal must not make the whole batch not finite.
    return torch.where(
        var_at > torch.addcmul(var / 64, mean, mean, value=rounding).clamp_min(1e-30), var_at.reciprocal(), 0.0
    )


def _where(ok: Tensor | bool, new: Sequence[Any], old: Iterable[Any]) -> Sequence[Any]:
    """``new`` if ``ok``, else ``old``. None stays None."""
    if isinstance(ok, bool):
        return new if ok else [a for a, _ in zip(old, new, strict=False)]
    return [None if a is None else torch.where(ok, a, b) for a, b in zip(new, old, strict=False)]


def renew(
    covariance: Tensor, keep: Tensor | float, left: Tensor, right: Tensor, whole: Tensor | None, in_place: bool
) -> Tensor:
    """Keep * covariance + sum_s left_s right_s + whole; in place or not by the same kernels, to the same bits."""
    same = covariance.dtype == left.dtype
    over = in_place and same
    if same and isinstance(keep, float) and right.shape[1] == 1:
        new = (covariance.addmm_ if over else covariance.addmm)(left.t(), right.squeeze(1), beta=keep)
    else:
        new = add_spread_(covariance.mul_(keep) if over else covariance.to(left.dtype) * keep, left, right)
    if whole is not None:
        new += whole
    if same:
        return new
    return covariance.copy_(new) if in_place else new.to(covariance.dtype)
