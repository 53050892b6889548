"""Batches that follow each other without a step between, pooled at once: what core/exponential.py makes of one by one.

While the weights stand still, every recursion of that file is linear, with coefficients that are mere numbers:

    mean_t = (1 - s_t) mean_(t-1) + s_t m_t  =>  mean_t = sum_j w_tj m_j,  w_tj = s_j (1 - s_(j+1)) ... (1 - s_t)
    P_t = (1 - at_t) P_(t-1) + at_t E_t[p]   =>  the same with at
    D_t = (1 - at_t) D_(t-1) + at_t (Cov_t + apart_t (E_t[p] - P_(t-1)))

with the past, carried to today's weights, as the zeroth of them. So B batches cost a few products with matrices of
B + 1 rows, not B times the small operations. What the weights get of f_t (core/answer.py) goes by P_(t-1), E_t[p], D_t
and Cov_t of every batch; summed over t that is a sum over the past's P and D and over the positions that were seen.

Letters: B batches (of J of them positions were seen, S of each), C channels, G groups, K values of a patch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .answer import By, answer
from .exponential import Past, carry, count_numbers, inverse, renew, without_map
from .moments import Moments, blend_each, remaining
from .pooled import Pooled, Response, Rule
from .sampling import SeenOfEach
from .tensors import finite

__all__ = ["advance_each"]


class _Seen(NamedTuple):
    """What of the positions stands in a response beside the patches."""

    left: Tensor  # (J, S, C)
    which: Tensor  # (J,) of the B batches
    looked: Tensor  # (B, 1), one for these, else zero
    left_in: Tensor  # (B + 1, B + 1), what of P and D at j is left at t


def advance_each(
    past: Past,
    now: Moments,
    seen: SeenOfEach | None,
    rows: Tensor,
    bias: Tensor | None,
    rule: Rule,
    alone: int = 0,
) -> tuple[Pooled, Response | None, Past] | None:
    """Pool B batches of one size with the past, and each with those before it.

    Args:
        past: all batches before.
        now: their moments (B, C), and the values a channel of each.
        seen: of J of them, relative to their means; None: there is no map to carry the past by.
        rows: W (C, K).
        bias: b (C,).
        rule: how; ``kept`` for each of them.
        alone: so many of the first are normalised by themselves alone, and taken in all the same.

    Returns:
        What to normalise by, (B C,) each; how that answers to the map, given f of (B C,); and the past with all of
        them in it. None if something is not finite: then each has to be looked at by itself.
    """
    sizes, shares, newer = _shares(past, now, seen, rule)
    s, at = (past.sizes.new_tensor(v).unsqueeze(1) for v in (shares, newer))
    if seen is None:
        mean, var = blend_each(past.mean, past.var, now.mean, now.var, shares)
        new = without_map(past, past.sizes.new_tensor(sizes), mean[-1], var[-1])
        return (_pooled(mean, var, s, now, alone), None, new) if finite(mean + var) is True else None
    carried, _ = carry(past, None, rows, bias, None, rule)
    mean, var = blend_each(carried.mean, carried.var, now.mean, now.var, shares)
    # The positions' moments; where a batch was not looked at its share of them is zero.
    looked = torch.zeros_like(at)
    looked[seen.which] = 1
    today, scatter = now.mean.clone(), torch.zeros_like(var)
    today[seen.which] += seen.offset
    scatter[seen.which] = seen.spread
    mean_at, var_at = blend_each(carried.mean_at, carried.var_at, today, scatter, newer)
    if finite(mean + mean_at) is not True or finite(var + var_at) is not True:
        return None
    mean_at_before = _before(carried.mean_at, mean_at)
    offset = torch.where(looked > 0, today, mean_at_before) - now.mean
    apart = (today - mean_at_before) * (1 - at) * looked

    per = inverse(var_at, var, mean)
    gap = (_before(carried.mean, mean) - now.mean) * s
    if carried.var_by_patch is not None:
        gap[0] += carried.var_by_patch
    # From the second batch on the past is at today's weights already: its ratio is one.
    mean_by = None if carried.mean_by is None else _before(carried.mean_by, (mean - mean_at) * per)
    var_by = _before(carried.var_by, (var > 0).to(var.dtype) if rule.second_moment else var * per)
    through = torch.full_like(s, float(rule.gradient))
    through[:alone] = 0
    by = By(s, at, through, mean_by, var_by, gap, apart, None, offset, now.var - scatter, per)

    more = _Seen(seen.left, seen.which, looked, remaining(newer, mean.device).to(mean.dtype))
    patches = torch.cat([past.patch.unsqueeze(0), seen.patch, seen.right.flatten(0, 1)])
    response = Response(patches, past.covariance, None, None, [*by, *more], _answer_each)
    # The last D and P are such sums too.
    last = torch.zeros_like(mean)
    last[-1] = 1
    lefts, _ = _of_patches(more, at, apart, torch.zeros_like(mean), torch.zeros_like(mean), last, 0 * last)
    kept = float(more.left_in[-1, 0])
    covariance = renew(past.covariance, kept, lefts, patches, None, False)
    weights = (more.left_in[-1, 1:] * at[:, 0])[seen.which]
    patch = kept * past.patch + torch.tensordot(weights, seen.patch, 1)
    new = Past(past.sizes.new_tensor(sizes), mean[-1], var[-1], mean_at[-1], var_at[-1], per[-1], patch, covariance)
    return _pooled(mean, var, s, now, alone), response, new


def _pooled(mean: Tensor, var: Tensor, s: Tensor, now: Moments, alone: int) -> Pooled:
    """Of moments (B, C) and shares (B, 1), the first of them by themselves ``alone``."""
    share = s.repeat(1, mean.shape[1])
    if alone:
        mean, var = (torch.cat([own[:alone], each[alone:]]) for own, each in ((now.mean, mean), (now.var, var)))
        share[:alone] = 1
    return Pooled(mean.flatten(), var.flatten(), share.flatten())


def _shares(
    past: Past, now: Moments, seen: SeenOfEach | None, rule: Rule
) -> tuple[list[float], list[float], list[float]]:
    """What is counted in the end, and the shares s and at of every batch."""
    n = float(now.size) if rule.by_count else 1.0
    looked = set() if seen is None else set(seen.which.tolist())
    sizes, shares, at = past.sizes.tolist(), list[float](), list[float]()
    for t in range(len(now.mean)):
        sizes, s, newer = count_numbers(sizes, float(rule.kept), n, t in looked)
        shares.append(s)
        at.append(newer)
    return sizes, shares, at


def _before(first: Tensor, each: Tensor) -> Tensor:
    """(B, C) of what was there when each batch came: ``first`` (C,), then what was left by the one before."""
    return torch.cat([first.unsqueeze(0), each[:-1]])


def _answer_each(by: Sequence[Any], f: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of :class:`Response`: for all patches (1 + J + J S, C), the past's D, and b; f (B C,) each."""
    given, more = By(*by[: len(By._fields)]), _Seen(*by[len(By._fields) :])
    of_mean, of_var, back_mean, back_var = (each.view_as(given.gap) for each in f)
    (yesterdays, todays), of_d, own, of_b = answer(given, (of_mean, of_var, back_mean, back_var))
    assert given.apart is not None
    assert isinstance(given.at, Tensor)
    lefts, of_past = _of_patches(more, given.at, given.apart, yesterdays, todays, of_d, own)
    return [lefts, of_past, of_b.sum(0)]


def _of_patches(
    more: _Seen, at: Tensor, apart: Tensor, yesterdays: Tensor, todays: Tensor, of_d: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """What goes by the past's P, E[p] of each look and its positions, (1 + J + J S, C), and by the past's D.

    Args:
        more: what of the positions is at hand.
        at: (B, 1) shares of P and D.
        apart: (B, C).
        yesterdays: (B, C) what goes by P_(t-1).
        todays: by E_t[p].
        of_d: by D_t.
        own: by Cov_t.
    """
    none = torch.zeros_like(of_d[:1])
    by_d = more.left_in.t() @ torch.cat([none, of_d])  # D_t is a sum of all before
    added = by_d[1:] * at  # of Cov_t + apart_t (E_t[p] - P_(t-1))
    by_p = yesterdays + todays * (1 - more.looked) - added * apart  # without a look E[p] is taken to be P
    by_p = more.left_in.t() @ torch.cat([by_p, none])  # by P_(t-1), t = 1 ... B
    patches = (todays + added * apart + by_p[1:] * at)[more.which]
    positions = more.left * (added + own)[more.which].unsqueeze(1)
    return torch.cat([by_p[:1], patches, positions.flatten(0, 1)]), by_d[0]
