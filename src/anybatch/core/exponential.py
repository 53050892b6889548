"""Moments pooled over all past batches with exponentially falling shares, in the memory of one.

Batch t, of n_t values a channel, counts c_t = n_t lambda^(now - t), lambda = 1 - 1/k: of batches of one size the newest
has the share 1/k, as in a window of k. Of the past are kept C = sum c, its mean and variance (spread between batches
included) and, over the positions that were looked at (core/sampling.py),

    P = E[p],   mean_at = <P, W_t> + b_t,   D = E[(y - E[y]) (p - E[p])],   var_at = <D, W_t>

with W_t, b_t the weights they were last read with. At today's weights, with r = <D, W> / var_at:

    'deviation':      mean(W) = <P, W> + b + r (mean - mean_at),   var(W) = r^2 var
    'second_moment':  mean(W) = <P, W> + b +   (mean - mean_at),
                      var(W) = max(var + 2 (<D, W> - var_at) - (mean(W) - mean)^2, 0)

Today's batch, with share s = n / (lambda C + n), then makes with d = mean(W) - mean_t

    mean = mean_t + (1 - s) d,    var = (1 - s) var(W) + s (var_t + (1 - s) d^2)

and P, D, mean_at, var_at likewise of the positions. While weights stand still this is BatchNorm on the batches'
weighted concatenation. Beside the sum over batches of what core/taylor.py makes of each, with these shares, the mean is
the same and the variance is off by the second order: it is expanded from step to step, and of all batches together.

Mean and variance are true moments; the positions say only how these change. In 'deviation' both are blind to the scale
of W whatever positions were seen: <dvar/dW, W> = 2 var(W) and <dmean/dW, W> = mean(W) - b, exactly, by

    dmean/dW = P + (mean - mean_at) D / var_at,     dvar/dW = 2 r var D / var_at

Letters: C channels, G groups, K values of a patch, S positions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import Moments, blend
from .pooled import Pooled, Response, Rule, add_spread_
from .ranks import total
from .sampling import Seen
from .taylor import by_patch
from .tensors import at_hand, finite

__all__ = ["Past", "advance"]


class Past(NamedTuple):
    """All batches so far. Of a batch spread over ranks each has its part of ``patch`` and ``covariance``."""

    size: Tensor  # () C
    means: Tensor  # (2, C) mean, mean_at
    variances: Tensor  # (2, C) var (population), var_at
    patch: Tensor  # (G, K) P
    covariance: Tensor  # (C, K) D, float32 or better, or bfloat16


class _Carried(NamedTuple):
    means: Tensor  # (2, C) mean(W), <P, W> + b
    variances: Tensor  # (2, C) var(W), <D, W>
    mean_by: Tensor  # dmean/dW = P + mean_by D
    var_by: Tensor  # dvar/dW = var_by D + var_by_patch P
    var_by_patch: Tensor | None


def advance(
    past: Past,
    now: Moments,
    seen: Seen,
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
        seen: of this rank's part of it, relative to ``now.mean``.
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
    size = past.size * (1 - 1 / rule.window) + n
    share = n / size.clamp_min(1)
    s = share.item() if at_hand(share) else share
    keep = 1 - s
    carried, offset, scatter = _carry(past, seen, rows, bias, part, rule)
    today = torch.stack([now.mean, now.mean + offset])
    means, variances = blend(carried.means, carried.variances, today, torch.stack([now.var, scatter]), s)
    pooled = Pooled(means[0], variances[0], share)
    if used is not None:
        alone = (now.mean, now.var, torch.ones_like(share))
        pooled = Pooled(*(torch.where(used, p, a) for p, a in zip(pooled, alone, strict=True)))
    apart = (today[1] - carried.means[1]) * keep
    lean = None if part is None else seen.offset - offset
    through = float(rule.gradient) if used is None else used * float(rule.gradient)
    mapped = bool(rows.shape[1])
    by = _answers(carried, now, s, through, apart, lean, offset, scatter, means, variances) if mapped else None
    # A compiler computes in the backward, from a past that has moved on, what the forward has no need of.
    ok = finite(means + variances if by is None else by)
    if isinstance(now.size, Tensor):
        ok = bool(now.size > 0) and ok if isinstance(ok, bool) else ok & (now.size > 0)
    if take is not None:
        ok = ok & take
    if ok is False:
        new = past
    else:
        patch = past.patch.lerp(seen.patch if part is None else seen.patch * part, s)
        size, means, variances, patch = _where(ok, (size, means, variances, patch), past)
        new = Past(size, means, variances, patch, past.covariance)
    if by is None:
        return pooled, None, new, ok
    left = seen.left if part is None else seen.left * part
    patches = torch.stack([past.patch, seen.patch if part is None else seen.patch * part])
    second = seen.covariance if part is None or seen.covariance is None else seen.covariance * part
    if new is not past:
        tilt = apart if lean is None else apart + lean
        lefts, rights = torch.cat([left * s, torch.stack([-s * apart, s * tilt])]), torch.cat([seen.right, patches])
        whole = None if second is None else second * s
        keep, lefts, rights, whole = _where(ok, (keep, lefts, rights, whole), (1.0, 0.0, 0.0, 0.0))
        new = new._replace(covariance=_renew(past.covariance, keep, lefts, rights, whole, in_place))
    if second is not None:
        return pooled, Response(patches, new.covariance, second, None, None, by), new, ok
    return pooled, Response(patches, new.covariance, None, left, seen.right, by), new, ok


def _carry(
    past: Past, seen: Seen, rows: Tensor, bias: Tensor | None, part: Tensor | None, rule: Rule
) -> tuple[_Carried, Tensor, Tensor]:
    """The past at today's weights; mean (less the reference) and variance of the positions seen on all ranks."""
    (mean, mean_at), (var, var_at) = past.means.unbind(), past.variances.unbind()
    if not rows.shape[1]:
        zeros = torch.zeros_like(mean)
        return _Carried(past.means, past.variances, zeros, zeros, None), zeros, zeros
    new_mean_at = by_patch(past.patch.unsqueeze(1), rows)[:, 0]
    new_var_at = torch.linalg.vecdot(past.covariance.to(rows.dtype), rows)
    offset, scatter = seen.offset, seen.spread
    if scatter is None:  # <covariance, W>: of the outputs' own variance a map in half precision has rounded each
        scatter = torch.linalg.vecdot(seen.left.t(), by_patch(seen.right.transpose(0, 1), rows))
        if seen.covariance is not None:
            scatter = torch.linalg.vecdot(seen.covariance, rows)
    if part is not None:
        parts = torch.stack([new_mean_at, new_var_at, offset * part, torch.addcmul(scatter, offset, offset) * part])
        new_mean_at, new_var_at, offset, scatter = total(parts, rule.group).unbind()
        scatter = scatter - offset.square()
    if bias is not None:
        new_mean_at = new_mean_at + bias
    if rule.second_moment:
        new_mean = new_mean_at + (mean - mean_at)
        delta = new_mean - mean
        new_var = var + 2 * (new_var_at - var_at) - delta.square()
        twice = 2 * (new_var > 0).to(new_var.dtype)
        new_var, mean_by, var_by, by_patch_ = new_var.clamp_min(0), torch.zeros_like(mean), twice, -twice * delta
    else:
        per = _inverse(var_at, var)
        ratio = torch.where(per > 0, new_var_at * per, torch.ones_like(var))
        rest = mean - mean_at
        mean_by, by_patch_ = rest * per, None
        new_mean = torch.addcmul(new_mean_at, rest, ratio)
        by = ratio * var
        new_var, var_by = by * ratio, by * per * 2
    means, variances = torch.stack([new_mean, new_mean_at]), torch.stack([new_var, new_var_at])
    return _Carried(means, variances, mean_by, var_by, by_patch_), offset, scatter


def _answers(
    carried: _Carried,
    now: Moments,
    s: Tensor | float,
    through: Tensor | float,
    apart: Tensor,
    lean: Tensor | None,
    offset: Tensor,
    scatter: Tensor,
    means: Tensor,
    variances: Tensor,
) -> Tensor:
    """A of :class:`Response`, (5, 4, C), for yesterday's P, today's E[p], D with today in it, today's own, and b.

    (1 - s) times yesterday's D is D less what today added to it. What is taken back of 'later' is today's; what the
    positions do not see of it along W goes by D.
    """
    by_gap = (carried.means[0] - now.mean) * (2 * s)
    by_patch_ = by_gap if carried.var_by_patch is None else by_gap + carried.var_by_patch
    no, one = torch.zeros_like(by_gap), torch.ones_like(by_gap)
    past = torch.stack([one, by_patch_]) * ((1 - s) * through)
    d = torch.stack([carried.mean_by, torch.addcmul(carried.var_by, by_gap, carried.mean_by)]) * through
    own, per = d * s, _inverse(variances[1], variances[0])
    rows = (
        *(*torch.addcmul(past, own, apart), no, no),
        *(*own * -(apart if lean is None else apart + lean), one, no if lean is None else lean),
        *(*d, -offset * per, (now.var - scatter) * per),
        *(*-own, no, one),
        *(*past, one, no),
    )
    return torch.stack(rows).view(5, 4, -1)


def _inverse(var_at: Tensor, var: Tensor) -> Tensor:
    """1 / var_at, or zero where the positions have seen too little of the variance to say how it changes."""
    # A literal: a compiler asked for dynamic sizes takes a global number for one of them.
    # Below 1e-30 eps is all there is, and one weak channel's reciprocal must not make the whole batch not finite.
    return torch.where(var_at > (var / 64).clamp_min(1e-30), var_at.reciprocal(), torch.zeros_like(var))


def _where(ok: Tensor | bool, new: Sequence[Any], old: Iterable[Tensor | float]) -> Sequence[Any]:
    """``new`` if ``ok``, else ``old``; a mere bool is true here. None stays None."""
    if isinstance(ok, bool):
        return new
    return [None if a is None else torch.where(ok, a, b) for a, b in zip(new, old, strict=False)]


def _renew(
    covariance: Tensor, keep: Tensor | float, left: Tensor, right: Tensor, whole: Tensor | None, in_place: bool
) -> Tensor:
    """Keep * covariance + sum_s left_s right_s + whole."""
    same = covariance.dtype == left.dtype
    if not (in_place and same):
        new = covariance.to(left.dtype) * keep
        add_spread_(new, left, right)
    elif isinstance(keep, float) and len(right[0]) == 1:
        new = covariance.addmm_(left.t(), right.squeeze(1), beta=keep)
    else:
        new = add_spread_(covariance.mul_(keep), left, right)
    if whole is not None:
        new += whole
    if same:
        return new
    return covariance.copy_(new) if in_place else new.to(covariance.dtype)
