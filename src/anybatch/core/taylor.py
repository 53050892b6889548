"""Past moments carried over to today's weights, and the gradient through them.

For entry t of the history, taken at weights W_t, with c_t = E_t[(y - mean_t) p], so that d var_t / dW = 2 c_t:

    mean_t(W) = mean_t + <E_t[p], W - W_t> + b - b_t                    exact: the mean is linear in W
    'deviation':      sd_t(W) = sd_t + <c_t, W - W_t> / sd_t,  var_t(W) = sd_t(W)^2 = var_t (<c_t, W> / <c_t, W_t>)^2
    'second_moment':  nu_t(W) = nu_t + <d nu_t / dW, W - W_t>,  var_t(W) = max(nu_t(W), mean_t(W)^2) - mean_t(W)^2

The second is the paper's, nu = E[y^2]. It is computed as var_t + 2 <c_t, W - W_t> - delta_t^2 with
delta_t = mean_t(W) - mean_t, floored at zero, so that nothing cancels at large means.

Why the standard deviation: <c_t, W> is the covariance of the entry's outputs under W_t and under W, so by
Cauchy-Schwarz var_t(W) is below the true variance by var (1 - correlation^2): what is left when one is regressed on the
other. Expanding the variance itself leaves the variance of their plain difference, which is more, and expanding E[y^2]
leaves its second moment, which is more again. It is never negative, so no floor is needed, and it is homogeneous of
degree 2 in W, as the variance is: the normalised output stays exactly blind to the scale of W.

W_t enters by two scalars a channel, <E_t[p], W_t> + b_t and <c_t, W_t>, so no copy of old weights is kept.
Letters: T entries, C channels, G groups, K values of a patch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import Moments, pool
from .pooled import Pooled, Response, Rule
from .ranks import Group, total

__all__ = ["Carried", "Entries", "Responses", "by_patch", "carry", "history_gradient", "pool_entries", "responses"]


class Entries(NamedTuple):
    """Past batches; entries of size 0 are empty slots and hold zeros."""

    sizes: Tensor  # (T,) values per channel
    mean: Tensor  # (C, T)
    var: Tensor  # (C, T) population
    mean_at: Tensor  # (C, T) <E[p], W_t> + b_t, at the entry's own weights
    var_at: Tensor  # (C, T) <E[(y - mean) p], W_t>
    patch: Tensor  # (G, T, K) E[p]
    covariance: Tensor  # (C, T, K) E[(y - mean) p]


class Carried(NamedTuple):
    """Past moments at today's weights, and how they answer to them."""

    mean: Tensor  # (C, T)
    var: Tensor  # (C, T)
    varby_patch: Tensor  # (C, T) d var_t / dW_c = varby_patch * E_t[p] + var_by_covariance * c_t; d / db the former
    var_by_covariance: Tensor  # (C, T)


class Responses(NamedTuple):
    """What patches and covariances say of weights."""

    mean: Tensor  # (C, T) <E[p], W_c> + b_c
    var: Tensor  # (C, T) <E[(y - mean) p]_c, W_c>


def responses(
    past: Entries, patch: Tensor, covariance: Tensor, rows: Tensor, bias: Tensor | None, group: Group = None
) -> tuple[Responses, Responses]:
    """Responses to the weights ``rows`` (C, K) and ``bias`` (C,): of past entries, and of the current batch (T = 1).

    Args:
        past: T entries.
        patch: (G, K) of the current batch.
        covariance: (C, K) likewise.
        rows: W.
        bias: b.
        group: the ranks whose parts of patches and covariances add up to the whole.
    """
    past_mean, now_mean = by_patch(past.patch, rows), by_patch(patch.unsqueeze(1), rows)
    past_var, now_var = (torch.bmm(c, rows.unsqueeze(2)).squeeze(2) for c in (past.covariance, covariance.unsqueeze(1)))
    if group is not None and patch.numel():
        parts = torch.stack([torch.cat([past_mean, now_mean], 1), torch.cat([past_var, now_var], 1)])
        whole = total(parts, group)
        (past_mean, past_var), (now_mean, now_var) = whole[..., :-1], whole[..., -1:]
    if bias is not None:
        past_mean, now_mean = past_mean + bias.unsqueeze(1), now_mean + bias.unsqueeze(1)
    return Responses(past_mean, past_var), Responses(now_mean, now_var)


def by_patch(patch: Tensor, rows: Tensor) -> Tensor:
    """<E[p], W_c> for patches (G, T, K) and weights (C, K): (C, T)."""
    if len(patch) == 1:
        return torch.mv(rows, patch[0, 0]).unsqueeze(1) if patch.shape[1] == 1 else rows @ patch[0].t()
    return torch.matmul(_by_group(rows, patch), patch.transpose(1, 2)).flatten(0, 1)


def carry(past: Entries, today: Responses, second_moment: bool) -> Carried:
    """Carry the moments of past batches over to the weights that they respond to like ``today``."""
    delta, response = today.mean - past.mean_at, today.var
    mean = past.mean + delta
    if second_moment:
        var = past.var + 2 * (response - past.var_at) - delta.square()
        live = (var > 0).to(var.dtype)
        return Carried(mean, var.clamp_min(0), -2 * live * delta, 2 * live)
    # In exact arithmetic var_at is var. A constant channel has both zero, and where rounding has eaten one up there is
    # nothing to go by: such an entry stays as it is.
    alive = (past.var_at - past.var).abs() < past.var / 4
    ratio = torch.where(alive, response / past.var_at, 1.0)
    slope = past.var * ratio
    return Carried(mean, slope * ratio, torch.zeros_like(mean), torch.where(alive, 2 * slope / past.var_at, 0.0))


def history_gradient(
    past: Entries, carried: Carried, shares: Tensor, pooled_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How the pooled moments answer to today's weights through the history, per channel.

    With pooled mean and var of :func:`anybatch.core.moments.pool` and shares s_t (T,) of the entries,

        d mean / dW_c = sum_t s_t E_t[p]
        d var / dW_c  = sum_t s_t ( 2 (mean_t - mean) E_t[p] + d var_t / dW_c )

    Returns:
        d mean / dW (G, K), d var / dW (C, K), d var / db (C,); d mean / db is sum(shares).
    """
    of_patch = shares * (2 * (carried.mean - pooled_mean.unsqueeze(1)) + carried.varby_patch)
    through_patch = torch.matmul(_by_group(of_patch, past.patch), past.patch).flatten(0, 1)
    by_covariance = torch.bmm((shares * carried.var_by_covariance).unsqueeze(1), past.covariance).squeeze(1)
    return torch.matmul(shares, past.patch), through_patch + by_covariance, of_patch.sum(1)


def pool_entries(
    past: Entries,
    now: Moments,
    patch: Tensor,
    covariance: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    rule: Rule,
    used: Tensor | None = None,
) -> tuple[Pooled, Response | None, Responses]:
    """Pool a batch with past ones.

    Args:
        past: T entries.
        now: the batch's moments, over all ranks.
        patch: E[p] (G, K) of this rank's part of it.
        covariance: E[(y - mean) p] (C, K) likewise.
        rows: W (C, K); K = 0 where there is no map to speak of.
        bias: b (C,).
        rule: how.
        used: a bool on the device, False: normalise by the batch alone.

    Returns:
        What to normalise by; how that answers to the map, None without one; and the batch's own responses.
    """
    today, own = responses(past, patch, covariance, rows, bias, rule.group)
    carried = carry(past, today, rule.second_moment)
    sizes = past.sizes if rule.by_count else past.sizes.sign()
    size = now.size if rule.by_count else 1
    if used is not None:
        sizes = sizes * used
    weights = torch.cat([sizes.new_ones(1) * size, sizes])
    shares = weights / weights.sum().clamp_min(1)
    means = torch.cat([now.mean[:, None], carried.mean], 1)
    mean, var = pool(means, torch.cat([now.var[:, None], carried.var], 1), shares)
    pooled = Pooled(mean, var, shares[0])
    if not rows.shape[1]:
        return pooled, None, own
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    of_patch, of_covariance = torch.stack([zeros, zeros, ones, zeros]), torch.stack([zeros, zeros, zeros, ones])
    if not rule.gradient:
        by = torch.stack([of_patch, of_covariance, of_patch])
        return pooled, Response(patch.unsqueeze(0), covariance, None, None, (by,), _answer), own
    mean_by_weight, var_by_weight, var_by_bias = history_gradient(past, carried, shares[1:], mean)
    by = torch.stack(
        [
            torch.stack([ones, zeros, zeros, zeros]),
            of_patch,
            torch.stack([zeros, ones / 2, zeros, zeros]),
            of_covariance,
            torch.stack([ones * shares[1:].sum(), var_by_bias / 2, ones, zeros]),
        ]
    )
    patches = torch.stack([mean_by_weight, patch])
    return pooled, Response(patches, var_by_weight, covariance, None, (by,), _answer), own


def _answer(by: Sequence[Any], f: tuple[Tensor, Tensor, Tensor, Tensor]) -> Sequence[Tensor]:
    """Of :class:`Response`, by a matrix a channel."""
    matrix: Tensor = by[0]
    of = (matrix * torch.stack(f)).sum(1)
    patches = (len(of) - 1) // 2  # each with its covariance, and the bias
    return of[:patches], *of[patches:].unbind()


def _by_group(of_channels: Tensor, patch: Tensor) -> Tensor:
    """(C, *) as (G, C / G, *)."""
    groups = patch.shape[0]
    channels, last = of_channels.shape
    return of_channels.view(groups, channels // groups, last)
