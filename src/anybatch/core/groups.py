"""Moments of groups of examples and of channels, from the moments of each example and channel.

Small differentiable functions between ``measure`` and ``normalise_by`` (core/step.py): one pass over the input serves
any grouping. Every part of a group has as many values as the others, so the shares are equal.
"""

import torch
from torch import Tensor

from .moments import Moments, compute_dtype, pool

__all__ = ["moments_of_ghosts", "pool_batch", "pool_channels", "pool_examples", "pool_runs", "spread_over"]


def pool_runs(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments (..., C), pooled within ``groups`` runs of C / ``groups`` consecutive channels: (..., groups).

    In float32 or better, rounded once to their dtype: running moments may be kept in half precision.
    """
    if groups == mean.shape[-1]:
        return mean, var
    dtype = compute_dtype(mean.dtype)
    pooled = pool(*(t.to(dtype).reshape(*t.shape[:-1], groups, -1) for t in (mean, var)))
    return pooled[0].to(mean.dtype), pooled[1].to(var.dtype)


def spread_over(t: Tensor, size: int) -> Tensor:
    """(..., G) with every entry ``size`` times in a row: (..., G * size)."""
    return t.unsqueeze(-1).expand(*t.shape, size).flatten(-2)


def pool_channels(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments (..., C), each channel's replaced by those of its group of C / ``groups`` consecutive channels."""
    size = mean.shape[-1] // groups
    mean, var = pool_runs(mean, var, groups)
    return spread_over(mean, size), spread_over(var, size)


def _ghosts_of(examples: int, per_group: int) -> list[tuple[int, int]]:
    """How so many examples are cut into groups of at most ``per_group``: (groups, of so many examples), in order."""
    groups = -(-examples // per_group)
    size, larger = divmod(examples, groups)
    return [(n, of) for n, of in ((larger, size + 1), (groups - larger, size)) if n]


def pool_examples(mean: Tensor, var: Tensor, per_group: int) -> tuple[Tensor, Tensor]:
    """Moments (N, C), each example's replaced by those of its group of ``per_group`` consecutive examples.

    There are ceil(N / per_group) groups. Where N does not divide they are as equal as can be, the larger ones first.
    """
    (groups, size), *smaller = _ghosts_of(len(mean), per_group)
    if smaller:
        cut = groups * size
        first = pool_examples(mean[:cut], var[:cut], size)
        rest = pool_examples(mean[cut:], var[cut:], smaller[0][1])
        return torch.cat([first[0], rest[0]]), torch.cat([first[1], rest[1]])
    if size == 1:
        return mean, var
    mean, var = pool(*(t.view(groups, size, -1).transpose(1, 2) for t in (mean, var)))
    shape = groups, size, mean.shape[1]
    return mean.unsqueeze(1).expand(shape).flatten(0, 1), var.unsqueeze(1).expand(shape).flatten(0, 1)


def moments_of_ghosts(mean: Tensor, var: Tensor, per_group: int, positions: int) -> list[tuple[Moments, int]]:
    """The groups' own moments, one after another, from (N, C) as :func:`pool_examples` gives them: without gradients.

    For each size of group in turn: moments (groups, C), and how many examples such a group has. Groups of one value
    have no variance and are left out.
    """
    start, found = 0, list[tuple[Moments, int]]()
    for groups, size in _ghosts_of(len(mean), per_group):
        each = slice(start, start + groups * size, size)
        start = each.stop
        if size * positions > 1:
            found.append((Moments(mean.detach()[each], var.detach()[each], size * positions), size))
    return found


def pool_batch(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (N, C) of examples, pooled: (C,), those of the whole batch."""
    return (mean[0], var[0]) if len(mean) == 1 else pool(mean.T, var.T)
