"""Example weighing at inference (Summers & Dinneen; ICLR 2020; arXiv 1906.03548, section 3.1).

Training is torch's BatchNorm. Evaluation normalises each example i by its own moments mixed into the running ones:

    mu_i  = (1 - alpha) m_x  + alpha E[x_i]
    v_i   = (1 - alpha) m_x2 + alpha E[x_i^2]
    var_i = v_i - mu_i^2
    out   = gamma * (x_i - mu_i) / sqrt(var_i + eps) + beta

E over the example's own positions, m_x and m_x2 the running first and second moments: m_x2 is running_var +
running_mean^2. alpha = 0 is BatchNorm, alpha = 1 instance norm. Computed without E[x^2], as the pooled moments of two
parts with shares 1 - alpha and alpha:

    var_i = (1 - alpha) (running_var + (m_x - mu_i)^2) + alpha (var(x_i) + (E[x_i] - mu_i)^2)

Every layer of the library evaluates so when its ``alpha`` is set (layers/base.py); this one is for plain BatchNorm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.step import measure, normalise_by
from .base import NormLayer
from .config import NormConfig
from .ghost import GhostBN

__all__ = ["ExampleWeighedBN", "ExampleWeighedBatchNorm"]


class ExampleWeighedBatchNorm(NormLayer):
    """torch's BatchNorm over (N, *) in training; in evaluation moments of each example are mixed into the running ones.

    out = gamma * (x_i - mu_i) / sqrt(var_i + eps) + beta, the equations at the top of this file.

    Args:
        num_features: C.
        alpha: the share of the example's own moments, from 0 (BatchNorm) to 1 (instance norm); see
            :func:`anybatch.tune_example_weight`.
        eps: added to the variance, inside the square root.
        momentum: torch's: the weight of a new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch; without running statistics evaluation uses the batch's own, unweighed.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        sync: pool the batch's moments over the ranks of ``process_group`` (an attribute; torch's default group).

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's.

    Raises:
        AnybatchError: alpha outside of [0, 1], or an input that does not fit the layer.

    Source: section 3.1 of the paper.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            sync=sync,
        )

    def normalise(self, y: Tensor) -> Tensor:
        """By the batch's own moments, as torch does it."""
        y, mean, var = measure(y)
        batch = self.whole(mean, var, y)
        self.track_(batch.now, batch.examples)
        return normalise_by(y, batch.mean, batch.var, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class ExampleWeighedBN(NormConfig):
    """torch's BatchNorm, evaluated with example weighing; as :class:`anybatch.nn.ExampleWeighedBatchNorm`.

    Args:
        alpha: the share of the example's own moments in evaluation, from 0 to 1.
        sync: pool moments over ranks.
    """

    layer: ClassVar[type[NormLayer]] = ExampleWeighedBatchNorm

    alpha: float = 0.1
    sync: bool = False

    def in_groups(self, examples: int) -> GhostBN | None:
        """Ghosts, the running statistics of each after the other, as BatchNorm has it."""
        return None if self.sync else GhostBN(examples, "ghosts", self.alpha)
