"""Batch Group Normalization (Zhou et al. 2020; arXiv 2012.02782).

The input x (N, C, *) is read as (N, G, D), D = C * positions / G:

    mu_k  = E[x],  var_k = E[(x - mu_k)^2]            over (N, D), for each of the G groups
    out   = gamma_c * (x - mu_k) / sqrt(var_k + eps) + beta_c

G = C is BatchNorm. For G < C a group is a run of C / G channels: fewer groups for smaller batches. For G > C it is a
slice of one channel's plane, for very large batches; the input's size is then fixed. var is the population variance,
eps is inside the root. Running statistics have length G, by torch's rule: momentum, Bessel-corrected with the group's
count, once a training forward. Evaluation normalises every channel by its group's: for G <= C it folds.

Ours: where G is not given the first training batch settles it, and its N examples: the largest divisor of C up to
C * N / 32, at least 1. A moment is then taken over about as many values as BatchNorm's at 32 examples. Until then the
layer evaluates as the BatchNorm it replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.groups import pool_channels, pool_runs, spread_over
from ..core.moments import Moments
from ..core.step import measure, normalise_by, shaped_as
from ..errors import AnybatchError
from .base import NormLayer
from .config import NormConfig
from .options import check_divides, check_whole

__all__ = ["BGN", "BatchGroupNormalization"]


class BatchGroupNormalization(NormLayer):
    """Normalises (N, C, *), read as (N, G, *), over (N, *): G groups of channels, or of positions of a channel.

    out = gamma * (x - mu_k) / sqrt(var_k + eps) + beta, with the moments of the value's group k.

    Args:
        num_features: C.
        groups: G, a divisor or a multiple of C; None: settled by the first training batch of N examples, the largest
            divisor of C up to C * N / 32. The attribute ``groups`` then has it.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has gamma and beta, one of each a channel.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation, from 0 to 1; for G <= C.
        sync: pool the batch's moments over the ranks of ``process_group`` (an attribute; torch's default group).

    Shape: (N, C, *) -> (N, C, *). For G > C the sizes of * are those of the first input, and G / C divides their
        product.

    State: torch's BatchNorm's; running_mean and running_var have length G, and C until G is settled. A state_dict
        with another length settles it.

    Raises:
        AnybatchError: an option out of its range, ``groups`` neither a divisor nor a multiple of C, an input that does
            not fit the layer, for G > C one of another size than the first, or a state_dict with other groups.

    Source: arXiv 2012.02782; the choice of G is ours.
    """

    reshapes = ("running_mean", "running_var")
    takes_single_values = True  # a group's channels
    groups: int | None
    size: tuple[int, ...] = ()  # spatial, for G > C; the first input settles it

    def __init__(
        self,
        num_features: int,
        groups: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        alpha: float = 0.0,
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            groups=groups,
            sync=sync,
        )
        if groups is not None:
            self.settle(groups)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_whole("BGN", "groups", options["groups"], none=True)

    @classmethod
    def replacing(cls, bn: _BatchNorm, **options: Any) -> Self:
        """A layer in the place of ``bn``; its running moments are pooled over each group, or repeated for slices."""
        layer = super().replacing(bn, **options)
        if layer.groups is not None:
            layer.settle(layer.groups)
        return layer

    @torch.inference_mode(False)  # a first batch in inference mode must not make buffers that training cannot write
    @torch.no_grad()
    def settle(self, groups: int) -> None:
        """Take ``groups`` as G, and the running statistics of channels over to the groups."""
        channels = self.num_features
        check_divides("BGN", "groups", groups, channels, multiples=True)
        if self.alpha and groups > channels:
            raise AnybatchError(
                f"BGN: alpha={self.alpha} with groups={groups}, more than {channels} channels; an example's own "
                "moments are weighed by channel: set alpha=0"
            )
        self.groups = self.options["groups"] = groups
        self.can_weigh = groups <= channels
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean, self.running_var = self._grouped(self.running_mean, self.running_var)

    def _grouped(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (..., C) as moments (..., G): pooled over channels, or repeated for slices."""
        assert self.groups is not None
        if self.groups > self.num_features:
            slices = self.groups // self.num_features
            return mean.repeat_interleave(slices, -1), var.repeat_interleave(slices, -1)
        return pool_runs(mean, var, self.groups)

    @property
    def _slices(self) -> int:
        """Groups of one channel's plane, G / C; 1 for G <= C."""
        return max(1, (self.groups or 1) // self.num_features)

    def check(self, y: Tensor) -> None:
        """Refuse an input the layer cannot normalise; for G > C also one of another size than the first."""
        super().check(y)
        slices, size = self._slices, tuple(y.shape[2:])
        if slices == 1 or not y.numel():
            return
        if self.size and size != self.size:
            raise AnybatchError(
                f"BGN: the input has spatial size {size}, and the first had {self.size}; groups={self.groups} are "
                f"slices of the {self.num_features} channels' planes, of one size. Resize the input, or take at most "
                f"{self.num_features} groups"
            )
        positions = y[0, 0].numel()
        if positions % slices:
            raise AnybatchError(
                f"BGN: groups={self.groups} cut every channel into {slices} slices, and the spatial size {size} of the "
                f"input has {positions} positions, no multiple of that; choose other groups"
            )
        self.size = size

    @property
    def note(self) -> str:
        """What the groups are, where it is not plain."""
        if self.groups is None:
            return "groups settled by the first training batch"
        return "groups are slices of channels: one input size, not foldable" if self._slices > 1 else ""

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the groups, which go into the running statistics."""
        groups = self.groups or self._choose(len(y))
        if y.numel() == groups and self.running_mean is not None and self.group is None:
            return self.infer(y)  # one value a group has no variance
        x, mean, var = measure(self._cut(y))
        batch = self.whole(*pool_runs(mean, var, groups), y, y.numel() // groups)
        self.track_(batch.now, batch.examples)
        return shaped_as(self._by(x, batch.mean, batch.var), y)

    def statistics(self, y: Tensor) -> Moments:
        """The moments of the groups of ``y``; of its channels while G is not settled."""
        now = super().statistics(self._cut(y))
        groups = self.groups or self.num_features
        return Moments(*pool_runs(now.mean, now.var, groups), y.numel() // groups)

    def infer(self, y: Tensor) -> Tensor:
        """As BatchNorm on the moments of each channel's group; for G > C of each slice."""
        if self._slices == 1 or not y.numel():
            return super().infer(y)
        x = self._cut(y)
        if self.running_mean is None or self.running_var is None:
            x, mean, var = measure(x)
        else:
            mean, var = self.running_mean[None], self.running_var[None]
        return shaped_as(self._by(x, mean, var), y)

    def _cut(self, y: Tensor) -> Tensor:
        """(N, C, *) as it is, or as (N, G, D) for G > C."""
        groups = self.groups or 1
        return y if self._slices == 1 else y.reshape(len(y), groups, y.shape[1:].numel() // groups)

    def _by(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What :meth:`_cut` gave, normalised by the moments (1, G) of its groups."""
        run = x.shape[1] // mean.shape[1]
        mean, var = spread_over(mean, run), spread_over(var, run)
        gamma, beta = (p if p is None else p.repeat_interleave(self._slices) for p in (self.weight, self.bias))
        return normalise_by(x, mean, var, gamma, beta, self.eps)

    def channel_moments(self) -> tuple[Tensor, Tensor] | None:
        """The running moments of each channel's group; for G > C those of the channel's slices, pooled."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            return None
        if len(mean) >= self.num_features:
            return pool_runs(mean, var, self.num_features)
        run = self.num_features // len(mean)
        return mean.repeat_interleave(run), var.repeat_interleave(run)

    def example_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the example's groups; of its channels while G is not settled."""
        return pool_channels(mean, var, self.groups or self.num_features)

    @property
    def foldable(self) -> bool:
        """Whether evaluation is one scale and shift a channel: for G <= C, without ``alpha``."""
        return super().foldable and self._slices == 1

    def _choose(self, examples: int) -> int:
        channels = self.num_features
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise AnybatchError(
                f"BGN: groups=None on {dist.get_world_size()} processes, whose first batches could settle different "
                "ones; give groups"
            )
        limit = min(channels, max(1, channels * examples // 32))
        groups = max(d for d in range(1, limit + 1) if channels % d == 0)
        self.settle(groups)
        return groups

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Settled by what is loaded; the running moments of a plain BatchNorm become those of the groups."""
        keys = prefix + "running_mean", prefix + "running_var"
        if self.running_mean is not None and all(key in state_dict for key in keys):
            saved = state_dict[keys[0]], state_dict[keys[1]]
            length = len(saved[0])
            if self.groups is None and length != self.num_features:
                self.settle(length)
            elif self.groups is not None and length == self.num_features:
                state_dict = {**state_dict, **dict(zip(keys, self._grouped(*saved), strict=True))}
            elif length not in (self.groups, self.num_features):
                raise AnybatchError(
                    f"BGN: the state_dict has running statistics of {length} groups under {keys[0]!r}, and the layer "
                    f"has groups={self.groups} of {self.num_features} channels; build it with groups={length}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class BGN(NormConfig):
    """Batch Group Normalization; every option as in :class:`anybatch.nn.BatchGroupNormalization`.

    Args:
        groups: G; None: settled by the first training batch of N examples, the largest divisor of C up to C * N / 32.
        sync: pool moments over ranks.
    """

    layer: ClassVar[type[NormLayer]] = BatchGroupNormalization

    groups: int | None = None
    sync: bool = False
