"""Means and variances: of a batch, pooled over batches, averaged over time.

The only place where a mean or a variance is computed. Letters: N examples, C channels, T batches, m values per channel.
Variances are population variances (divided by m) unless the name says Bessel. Everything is kept as (mean, variance)
and never as (E[x], E[x^2]): at mean 1e4 and variance 1 the difference E[x^2] - E[x]^2 has no correct digit in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "bessel",
    "blend",
    "blend_each",
    "channel_mean",
    "compute_dtype",
    "moments",
    "pool",
    "position_mean",
    "remaining",
    "update_running_",
]


_LONG_ROW = 16  # values of a channel of one example, from which on GroupNorm's kernel is the faster


class Moments(NamedTuple):
    """Population moments of one batch per channel."""

    mean: Tensor  # (C,) float32 or better
    var: Tensor  # (C,) float32 or better, divided by size
    size: int | Tensor  # values per channel, m = N * positions; a () tensor where only the device knows


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are kept in for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def moments(x: Tensor) -> Moments:
    """Mean and population variance of each channel of ``x`` (N, C, *), over N and *.

    mean_c = 1/m sum x_c,  var_c = 1/m sum (x_c - mean_c)^2, in two passes, float32 or better. Zeros where x is empty.
    """
    size = x.numel() // x.shape[1]
    if not size:
        zeros = x.new_zeros(x.shape[1], dtype=compute_dtype(x.dtype))
        return Moments(zeros, zeros.clone(), 0)
    fast = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if fast and not torch.compiler.is_compiling():  # a compiler makes its own of var_mean
        if x.dim() > 2 and x.is_contiguous() and size >= _LONG_ROW * len(x):
            means, variances = _row_moments(x)
            return Moments(*((means[:, 0], variances[:, 0]) if len(x) == 1 else pool(means, variances)), size)
        # torch's own BatchNorm kernel: two passes, accumulated in float64, several times var_mean's speed on CPU.
        mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        return Moments(mean, var, size)
    var, mean = torch.var_mean(x.to(compute_dtype(x.dtype)), _all_but_channels(x), correction=0)
    return Moments(mean, var, size)


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and population variances (C, N) over * of contiguous ``x`` (N, C, *), by GroupNorm's kernel.

    It is vectorised where BatchNorm's is not, and its normalised output costs less than that. No variance is below
    its eps, 1e-30; deviations from some 1e17 on overflow, and at a mean of 1e4 of them the variance is off by 1e-4.
    """
    n, c = x.shape[:2]
    _, mean, inverse = torch.ops.aten.native_group_norm(x, None, None, n, c, x.numel() // (n * c), c, 1e-30)
    return mean.t(), inverse.pow(-2).t()


def channel_mean(x: Tensor) -> Tensor:
    """Mean of each channel of ``x`` (N, C, *), over N and *."""
    return x.mean(_all_but_channels(x))


def position_mean(x: Tensor) -> Tensor:
    """Mean of each example and channel of ``x`` (N, C, *), over * alone, in float32 or better: (N, C)."""
    return x.to(compute_dtype(x.dtype)).flatten(2).mean(2) if x.dim() > 2 else x.to(compute_dtype(x.dtype))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def pool(means: Tensor, variances: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments of T batches taken together, from the moments of each; differentiable.

    mean = sum_t s_t mean_t,  var = sum_t s_t ( var_t + (mean_t - mean)^2 )

    Args:
        means: (..., T).
        variances: (..., T), population.
        shares: (T,), not negative, of sum one; in proportion to the batches' counts they make this the moments of the
            concatenation. None: 1 / T each.
    """
    if shares is None:
        spread, mean = torch.var_mean(means, -1, correction=0)
        return mean, variances.mean(-1) + spread
    mean = (means * shares).sum(-1)
    apart = means - mean.unsqueeze(-1)
    return mean, (torch.addcmul(variances, apart, apart) * shares).sum(-1)


def blend(
    mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, rate: Tensor | float, total: bool = True
) -> tuple[Tensor, Tensor]:
    """Moments of two batches taken together, of which the new one has the share ``rate``; see :func:`pool`.

    mean + r d,  (1 - r) var + r (new_var [+ (1 - r) d^2]),  d = new_mean - mean; the last term if ``total``.
    """
    if total:
        new_var = _apart(mean, new_mean, new_var, rate)
    if isinstance(rate, Tensor):
        rate = rate.to(mean.dtype)
    return mean.lerp(new_mean.to(mean.dtype), rate), var.lerp(new_var.to(var.dtype), rate)


def blend_each(
    mean: Tensor, var: Tensor, means: Tensor, variances: Tensor, rates: Sequence[float], total: bool = True
) -> tuple[Tensor, Tensor]:
    """What :func:`blend` makes of ``mean`` and ``var`` (C,) and B batches (B, C), one after another: (B, C) each."""
    left, rate = remaining(rates, mean.device), torch.tensor(rates, dtype=torch.float64, device=mean.device)
    rate = rate.unsqueeze(1)
    blended = left @ torch.cat([mean.unsqueeze(0).to(left.dtype), rate * means])
    added = _apart(blended[:-1], means, variances, rate) if total else variances
    spread = left @ torch.cat([var.unsqueeze(0).to(left.dtype), rate * added])
    return blended[1:].to(mean.dtype), spread[1:].to(var.dtype)


def _apart(mean: Tensor, new_mean: Tensor, new_var: Tensor, rate: Tensor | float) -> Tensor:
    """``new_var`` with what :func:`blend` adds to it."""
    d = new_mean - mean
    if isinstance(rate, Tensor):
        return torch.addcmul(new_var, d, d * (1 - rate))
    return torch.addcmul(new_var, d, d, value=1 - rate)


def remaining(rates: Sequence[float], device: torch.device) -> Tensor:
    """What is left in each of a_t = (1 - r_t) a_(t-1) + ..., t = 0 ... B, of a_j: (B + 1, B + 1) float64.

    (1 - r_(j+1)) ... (1 - r_t); zero for j > t.
    """
    keeps = 1 - torch.tensor([0.0, *rates], dtype=torch.float64, device=device)
    later = torch.ones(len(keeps), len(keeps), dtype=torch.bool, device=device).tril(-1)
    return torch.where(later, keeps.unsqueeze(1), 1.0).cumprod(0).tril()


def bessel(var: Tensor, count: int | Tensor) -> Tensor:
    """Population variance of ``count`` values to the Bessel-corrected one, as torch keeps it in running_var."""
    fewer = (count - 1).clamp_min(1) if isinstance(count, Tensor) else max(count - 1, 1)
    return var * (count / fewer)


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    rate: Tensor | float,
    total: bool = True,
    ok: Tensor | bool | None = None,
) -> None:
    """Move running moments towards a batch's, in place.

    mean <- mean + r d,  var <- (1 - r) var + r var_t [+ r (1 - r) d^2],  d = mean_t - mean

    With the last term this is the exponential average of E[x] and E[x^2] without their cancellation: the running
    variance is the total variance, spread between batches included. torch's BatchNorm leaves it out.

    Args:
        running_mean: (C,), changed in place.
        running_var: (C,), changed in place.
        mean: the batch's, (C,); or (B, C) of B batches, at hand, that are taken in one after another.
        var: likewise.
        rate: torch's momentum, the weight of the new batch, in [0, 1].
        total: whether the spread between batches counts.
        ok: a bool, on the device if need be: False leaves the running moments as they are, whatever the batch's.
    """
    if isinstance(ok, bool):
        if not ok:
            return
    elif ok is not None:
        mean, var = torch.where(ok, mean, running_mean), torch.where(ok, var, running_var)
    if mean.dim() > 1:
        assert not isinstance(rate, Tensor)
        means, variances = blend_each(running_mean, running_var, mean, var, [rate] * len(mean), total)
        running_mean.copy_(means[-1])
        running_var.copy_(variances[-1])
        return
    if total:
        var = _apart(running_mean, mean, var, rate)
    if isinstance(rate, Tensor):
        rate = rate.to(running_mean.dtype)
    running_mean.lerp_(mean.to(running_mean.dtype), rate)
    running_var.lerp_(var.to(running_var.dtype), rate)
