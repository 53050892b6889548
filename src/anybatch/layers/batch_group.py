"""Batch and group normalization together, for very small batches: the fourth thing of "Four Things Everyone Should Know
to Improve Batch Normalization" (Summers, Dinneen; ICLR 2020; arXiv 1906.03548).

Channels are cut into ``channel_groups`` groups G_k of consecutive channels, the batch into groups B_j of
``examples_per_group`` consecutive examples (as Ghost BN cuts it, ghost.py). For channel c of group k, example n of j:

    mu_jk  = E[x],  var_jk = E[(x - mu_jk)^2]         over the examples of B_j, the channels of G_k and positions
    out_nc = gamma_c * (x_nc - mu_jk) / sqrt(var_jk + eps) + beta_c

var is the population variance, eps is inside the root. Running statistics are those of each channel over the whole
batch: exponential averages (torch's momentum, once a training forward) of its first and second moments m_c, s_c, kept
as mean and total population variance. Evaluation pools them over the channels of a group, and weighs in the moments of
the example's own channel group by ``alpha``:

    mu  = (1 - alpha) E_k[m_c] + alpha E_k[x_n],  var = (1 - alpha) E_k[s_c] + alpha E_k[x_n^2] - mu^2

alpha = 0 folds. Deviation: an N that does not divide is cut into groups as equal as can be.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.groups import pool_batch, pool_channels, pool_examples
from ..core.moments import Moments
from ..core.step import measure, normalise_by
from .base import NormLayer
from .config import NormConfig
from .options import check_divides, check_whole

__all__ = ["BatchAndGroupNorm", "BatchGroupNorm"]


class BatchAndGroupNorm(NormLayer):
    """Normalises (N, C, *) over groups of examples, groups of channels and all positions.

    out = gamma * (x - mu_jk) / sqrt(var_jk + eps) + beta, with the moments of example group j and channel group k.

    Args:
        num_features: C.
        channel_groups: groups that the channels are cut into; a divisor of C. C is Ghost BN's normalisation.
        examples_per_group: examples of a group, at most. 1 is GroupNorm in training.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation, from 0 to 1; 1 is GroupNorm.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's; running_var (C,) is the total population variance of each channel.

    Raises:
        AnybatchError: an option out of its range, C not a multiple of ``channel_groups``, or an input that does not
            fit the layer.

    Source: arXiv 1906.03548 and its code.
    """

    takes_single_values = True  # a group's channels
    channel_groups: int
    examples_per_group: int

    def __init__(
        self,
        num_features: int,
        channel_groups: int = 32,
        examples_per_group: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        alpha: float = 0.0,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            channel_groups=channel_groups,
            examples_per_group=examples_per_group,
        )
        check_divides("BatchGroupNorm", "channel_groups", channel_groups, num_features)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        for name in ("channel_groups", "examples_per_group"):
            check_whole("BatchGroupNorm", name, options[name])

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the groups; those of every channel go into the running statistics."""
        if y.numel() == self.channel_groups and self.running_mean is not None:
            return self.infer(y)  # one value a group has no variance
        y, mean, var = measure(y, by_example=len(y) > self.examples_per_group)
        whole = pool_batch(mean.detach(), var.detach())
        self.track_(Moments(*whole, y.numel() // y.shape[1]), len(y), total=True)
        mean, var = pool_channels(*pool_examples(mean, var, self.examples_per_group), self.channel_groups)
        return normalise_by(y, mean, var, self.weight, self.bias, self.eps)

    def channel_moments(self) -> tuple[Tensor, Tensor] | None:
        """The running moments, each channel's replaced by its group's."""
        if self.running_mean is None or self.running_var is None:
            return None
        mean, var = pool_channels(self.running_mean[None], self.running_var[None], self.channel_groups)
        return mean[0], var[0]

    def example_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the example's channel groups."""
        return pool_channels(mean, var, self.channel_groups)


@dataclass(frozen=True)
class BatchGroupNorm(NormConfig):
    """Batch and group normalization together; every option as in :class:`anybatch.nn.BatchAndGroupNorm`.

    Args:
        channel_groups: groups that the channels are cut into; has to divide every converted norm's channels.
        examples_per_group: examples of a group, at most.
        alpha: the share of the example's own moments in evaluation.
    """

    layer: ClassVar[type[NormLayer]] = BatchAndGroupNorm

    channel_groups: int = 32
    examples_per_group: int = 2
    alpha: float = 0.0
