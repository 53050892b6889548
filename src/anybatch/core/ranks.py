"""Sums and moments over the ranks of a process group, on any backend.

A batch of R parts, part r with m_r values a channel and moments mean_r, var_r, has s_r = m_r / sum m and

    mean = sum_r s_r mean_r,   var = sum_r s_r ( var_r + (mean_r - mean)^2 )

and with g, h the sums over ranks of dL/dmean, dL/dvar, of whatever every rank computes from them:

    dL/dmean_r = s_r ( g + 2 h (mean_r - mean) ),   dL/dvar_r = s_r h

One gather of 2 C + 2 numbers forward, one sum of 2 C backward. A part may be empty. A group of None is this process
alone: nothing is sent.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .moments import Moments, pool

__all__ = ["Group", "Whole", "pool_ranks", "rank_count", "total"]

Group = Any  # torch.distributed's ProcessGroup, which some builds of torch have not, or None


class Whole(NamedTuple):
    """Moments of a batch, all its parts together."""

    mean: Tensor
    var: Tensor  # population
    size: int | Tensor  # values a channel; a () tensor where the ranks had to be asked
    examples: int | Tensor
    apart: Tensor | None = None  # this rank's mean less the whole's; times the shares they add up to zero
    share: Tensor | None = None  # () this rank's, of the values

    @property
    def now(self) -> Moments:
        """The moments (C,), without gradient."""
        return Moments(self.mean.detach().flatten(), self.var.detach().flatten(), self.size)


def rank_count(group: Group) -> int:
    """The number of processes of a group."""
    return 1 if group is None else dist.get_world_size(group)


def total(t: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' tensors."""
    if group is None:
        return t
    t = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t, group=group)
    return t


def pool_ranks(mean: Tensor, var: Tensor, size: int | Tensor, examples: int, group: Group) -> Whole:
    """Moments (E, C) or (C,) of this rank's part, pooled over the ranks of ``group``; differentiable.

    Args:
        mean: of the part; of an empty one anything finite.
        var: population variances.
        size: values a channel that they are of.
        examples: in the part.
        group: its ranks take part in every call, and in every backward.
    """
    if group is None:
        return Whole(mean, var, size, examples)
    return Whole(*_PoolRanks.apply(mean, var, size, examples, group))  # type: ignore[no-untyped-call]


class _PoolRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, size: int, examples: int, group: Group) -> tuple[Tensor, ...]:
        part = torch.cat([mean.flatten(), var.flatten(), mean.new_tensor([size, examples])])
        parts = part.new_empty(rank_count(group) * len(part))
        dist.all_gather_single(parts, part, group=group)
        parts = parts.view(-1, len(part))
        sizes, all_examples = parts[:, -2], parts[:, -1].sum()
        all_sizes = sizes.sum()
        shares = sizes / all_sizes.clamp_min(1)
        means, variances = parts[:, :-2].t().reshape(2, *mean.shape, -1).unbind()
        whole_mean, whole_var = pool(means, variances, shares)
        share = size / all_sizes.clamp_min(1)
        # The rounded mean is not quite the mean: what they are all off by is taken back.
        apart = mean - whole_mean - ((means - whole_mean.unsqueeze(-1)) * shares).sum(-1)
        ctx.save_for_backward(apart, share)
        ctx.group = group
        ctx.mark_non_differentiable(all_sizes, all_examples, apart, share)
        return whole_mean, whole_var, all_sizes, all_examples, apart, share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        apart, share = ctx.saved_tensors
        by_mean, by_var = total(torch.stack([by_mean, by_var]), ctx.group).unbind()
        return share * (by_mean + 2 * by_var * apart), share * by_var, None, None, None
