"""Ghost Batch Normalization (Hoffer, Hubara, Soudry; NeurIPS 2017; arXiv 1705.08741), with the running statistics of
"Four Things Everyone Should Know to Improve Batch Normalization" (Summers, Dinneen; ICLR 2020; arXiv 1906.03548).

A batch of N examples is cut into ghosts of ``examples_per_group`` consecutive ones. For an example n of ghost j:

    mu_j  = E_j[x],  var_j = E_j[(x - mu_j)^2]        over the examples of the ghost and positions, per channel
    out_n = gamma * (x_n - mu_j) / sqrt(var_j + eps) + beta

var is the population variance, eps is inside the root. Evaluation is BatchNorm on the running statistics, so the layer
folds. With ``running`` 'batch', as Summers and Dinneen have it, those see the whole batch: its mean and its total
variance (not the mean of the ghosts' variances), Bessel-corrected and averaged by torch's momentum, once a training
forward. With 'ghosts' they see one ghost after another, as BatchNorm on each ghost would. One ghost for the whole batch
is torch's BatchNorm.

Deviation: where ``examples_per_group`` does not divide N, the ceil(N / examples_per_group) ghosts are as equal as can
be, so that no ghost is a tiny rest. Where it divides, they are the paper's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.groups import moments_of_ghosts, pool_batch, pool_examples
from ..core.moments import Moments
from ..core.step import measure, normalise_by
from .base import NormLayer
from .config import NormConfig
from .options import check_choice, check_whole

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
        running: 'batch' (the running statistics average whole batches) or 'ghosts' (one ghost after another, each a
            step of the average; one of a single value a channel, which has no variance, is none).

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's, the running statistics by ``running``; with 'ghosts' num_batches_tracked counts these.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer.

    Source: arXiv 1705.08741; running statistics of the whole batch, arXiv 1906.03548.
    """

    examples_per_group: int
    running: str

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
        running: Literal["batch", "ghosts"] = "batch",
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            examples_per_group=examples_per_group,
            running=running,
        )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_whole("GhostBN", "examples_per_group", options["examples_per_group"])
        check_choice("GhostBN", "running", options["running"], ("batch", "ghosts"))

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the ghosts; those of the whole batch, or these, go into the running statistics."""
        several = len(y) > self.examples_per_group
        y, mean, var = measure(y, by_example=several)
        values = y.numel() // y.shape[1]
        ghosts = pool_examples(mean, var, self.examples_per_group)
        if several and self.running == "ghosts":
            for now, examples in moments_of_ghosts(*ghosts, self.examples_per_group, values // len(y)):
                self.track_(now, examples)
        else:
            self.track_(Moments(*pool_batch(mean.detach(), var.detach()), values), len(y))
        return normalise_by(y, *ghosts, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class GhostBN(NormConfig):
    """Ghost BatchNorm; every option as in :class:`anybatch.nn.GhostBatchNorm`.

    Args:
        examples_per_group: examples of a ghost, at most.
        running: 'batch' or 'ghosts', what the running statistics average.
        alpha: the share of the example's own moments in evaluation.
    """

    layer: ClassVar[type[NormLayer]] = GhostBatchNorm

    examples_per_group: int = 32
    running: Literal["batch", "ghosts"] = "batch"
    alpha: float = 0.0

    def in_groups(self, examples: int) -> "GhostBN | None":
        """BatchNorm on each, where each is one ghost."""
        return GhostBN(examples, "ghosts", self.alpha) if examples <= self.examples_per_group else None
