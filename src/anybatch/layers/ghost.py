"""Ghost Batch Normalization (Hoffer, Hubara, Soudry; NeurIPS 2017; arXiv 1705.08741), with the running statistics of
"Four Things Everyone Should Know to Improve Batch Normalization" (Summers, Dinneen; ICLR 2020; arXiv 1906.03548).

A batch of N examples is cut into ghosts of ``examples_per_group`` consecutive ones. For an example n of ghost j:

    mu_j  = E_j[x],  var_j = E_j[(x - mu_j)^2]        over the examples of the ghost and positions, per channel
    out_n = gamma * (x_n - mu_j) / sqrt(var_j + eps) + beta

var is the population variance, eps is inside the root. Evaluation is BatchNorm on the running statistics, so the layer
folds. Those see the whole batch: its mean and its total variance (not the mean of the ghosts' variances), Bessel-
corrected and averaged by torch's momentum, once a training forward. One ghost for the whole batch is torch's BatchNorm.

Deviation: where ``examples_per_group`` does not divide N, the ceil(N / examples_per_group) ghosts are as equal as can
be, so that no ghost is a tiny rest. Where it divides, they are the paper's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.groups import pool_batch, pool_examples
from ..core.moments import Moments
from ..core.step import measure, normalise_by
from .base import NormLayer
from .config import NormConfig
from .options import check_whole

__all__ = ["GhostBN", "GhostBatchNorm"]


class GhostBatchNorm(NormLayer):
    """Normalises (N, C, *) per channel over every ``examples_per_group`` consecutive examples and all positions.

    out = gamma * (x - mu_j) / sqrt(var_j + eps) + beta, with the moments of the example's own ghost j.

    Args:
        num_features: C.
        examples_per_group: examples of a ghost, at most; a batch of no more than these is one ghost.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's; the running statistics are the whole batch's.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer.

    Source: arXiv 1705.08741; running statistics of the whole batch, arXiv 1906.03548.
    """

    examples_per_group: int

    def __init__(
        self,
        num_features: int,
        examples_per_group: int = 32,
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
            examples_per_group=examples_per_group,
        )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_whole("GhostBN", "examples_per_group", options["examples_per_group"])

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the ghosts; those of the whole batch go into the running statistics."""
        y, mean, var = measure(y, by_example=len(y) > self.examples_per_group)
        whole = pool_batch(mean.detach(), var.detach())
        self.track_(Moments(*whole, y.numel() // y.shape[1]), len(y))
        mean, var = pool_examples(mean, var, self.examples_per_group)
        return normalise_by(y, mean, var, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class GhostBN(NormConfig):
    """Ghost BatchNorm; every option as in :class:`anybatch.nn.GhostBatchNorm`.

    Args:
        examples_per_group: examples of a ghost, at most.
    """

    layer: ClassVar[type[NormLayer]] = GhostBatchNorm

    examples_per_group: int = 32
