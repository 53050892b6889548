"""Past moments carried over to today's weights, and the gradient through them.

For entry t of the history, taken at weights W_t, and delta_t = mean_t(W) - mean_t:

    mean_t(W) = mean_t + <E_t[p], W - W_t> + b - b_t               exact: the mean is linear in W
    var_t(W)  = var_t + <2 E_t[(y - mean_t) p], W - W_t>           first order; 'variance' expansion
    var_t(W)  =   ... - delta_t^2                                  'second_moment' expansion, the paper's
    var_t(W)  = max(var_t(W), 0)                                   the paper's floor max(nu, mu^2)

The paper expands nu = E[y^2] to first order and subtracts mu(W)^2; written in central moments that is the line with
- delta^2, and nothing cancels at large means. True variance less the expansion is d^T Cov(p) d >= 0 for 'variance' and
d^T E[p p^T] d for 'second_moment', d = W - W_t: the former leaves out (E[p] . d)^2, which is no small part of it when
the inputs come out of a ReLU. W_t enters by two scalars a channel, <E_t[p], W_t> + b_t and <E_t[(y - mean) p], W_t>,
so no copy of old weights is kept. Letters: T entries, C channels, G groups, K values of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Carried", "Entries", "carry", "history_gradient", "mean_response", "variance_response"]


class Entries(NamedTuple):
    """Past batches; entries of count 0 are empty slots and hold zeros."""

    count: Tensor  # (T,) values per channel
    mean: Tensor  # (T, C)
    var: Tensor  # (T, C) population
    mean_at: Tensor  # (T, C) <E[p], W_t> + b_t, at the entry's own weights
    var_at: Tensor  # (T, C) <E[(y - mean) p], W_t>
    patch: Tensor  # (T, G, K) E[p]
    covariance: Tensor  # (T, C, K) E[(y - mean) p]


class Carried(NamedTuple):
    """Past moments at today's weights."""

    mean: Tensor  # (T, C)
    var: Tensor  # (T, C), floored
    delta: Tensor  # (T, C) how far the mean moved
    live: Tensor  # (T, C) bool: not floored, the variance answers to W


def mean_response(patch: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """<E[p], W_c> + b_c for patches (T, G, K) and weights (C, K): (T, C)."""
    groups = patch.shape[1]
    out = torch.einsum("tgk,gck->tgc", patch, rows.unflatten(0, (groups, rows.shape[0] // groups))).flatten(1)
    return out if bias is None else out + bias


def variance_response(covariance: Tensor, rows: Tensor) -> Tensor:
    """<E[(y - mean) p]_c, W_c> for covariances (T, C, K) and weights (C, K): (T, C)."""
    return torch.einsum("tck,ck->tc", covariance, rows)


def carry(past: Entries, rows: Tensor, bias: Tensor | None, second_moment: bool) -> Carried:
    """Carry the moments of past batches over to the weights ``rows`` (C, K) and ``bias`` (C,)."""
    delta = mean_response(past.patch, rows, bias) - past.mean_at
    var = past.var + 2 * (variance_response(past.covariance, rows) - past.var_at)
    if second_moment:
        var = var - delta.square()
    return Carried(past.mean + delta, var.clamp_min(0), delta, var > 0)


def history_gradient(
    past: Entries, carried: Carried, shares: Tensor, pooled_mean: Tensor, second_moment: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """How the pooled moments answer to today's weights through the history, per channel.

    With pooled mean and var of :func:`anybatch.core.moments.pool` and shares s_t (T,) of the entries,

        d mean / dW_c = sum_t s_t E_t[p]
        d var / dW_c  = sum_t s_t ( 2 (mean_t - mean) E_t[p] + live_t ( 2 E_t[(y - mean_t) p] [- 2 delta_t E_t[p]] ) )

    Returns:
        d mean / dW (G, K), d var / dW (C, K), d var / db (C,); d mean / db is sum(shares).
    """
    share = shares.unsqueeze(1)
    live = carried.live * share
    spread = share * (carried.mean - pooled_mean)
    if second_moment:
        spread = spread - live * carried.delta
    groups = past.patch.shape[1]
    by_patch = torch.einsum("tgc,tgk->gck", spread.unflatten(1, (groups, -1)), past.patch).flatten(0, 1)
    by_covariance = torch.einsum("tc,tck->ck", live, past.covariance)
    return torch.einsum("t,tgk->gk", shares, past.patch), 2 * (by_patch + by_covariance), 2 * spread.sum(0)
