"""Batch Renormalization (Ioffe; NeurIPS 2017; arXiv 1702.03275).

The batch's moments mu_B, sigma_B, corrected towards the running ones mu, sigma as they were before this batch:

    sigma_B = sqrt(var_B + eps),   sigma = sqrt(var + eps)
    r   = clip(sigma_B / sigma, 1 / r_max(t), r_max(t))
    d   = clip((mu_B - mu) / sigma, -d_max(t), d_max(t))
    out = gamma * ((y - mu_B) / sigma_B * r + d) + beta

var_B is the population variance, eps is inside the roots. No gradient flows through r and d. Within the bounds the
output is (y - mu) / sigma, what evaluation does; the gradient is BatchNorm's times r. The bounds open with the training
forward t, counted from 1 in num_batches_tracked: up to ``ramp_from`` r_max = 1 and d_max = 0, which is BatchNorm, then
linearly to ``r_max`` and ``d_max`` at ``ramp_to``. (Training forwards, not epochs and not optimizer steps.)

Ours: one linear ramp for both bounds; the running statistics keep the total variance, and torch's momentum counts
examples (``momentum_batch``): what training and inference normalise by must average as many images at batch 1 as at 32.
Without running statistics there is nothing to correct towards, and the layer is BatchNorm.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.moments import Moments
from ..core.step import measure, normalise_by
from ..errors import AnybatchError
from .base import NormLayer
from .config import NormConfig
from .options import check_number, check_whole
from .replay import once

__all__ = ["BatchRenorm", "BatchRenormalization"]


class BatchRenormalization(NormLayer):
    """Normalises (N, C, *) per channel by the batch's moments, corrected within bounds towards the running ones.

    out = gamma * ((y - mu_B) / sigma_B * r + d) + beta, the equations at the top of this file.

    Args:
        num_features: C.
        r_max: largest correction of the scale, as a factor, at least 1.
        d_max: largest correction of the shift, in running standard deviations.
        ramp_from: training forwards of plain BatchNorm at first.
        ramp_to: training forward from which the bounds are ``r_max`` and ``d_max``.
        momentum_batch: examples of a batch at which ``momentum`` is torch's; a smaller batch of n moves the running
            statistics by 1 - (1 - momentum)^(n / momentum_batch). None: every forward counts the same, as in torch.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch of ``momentum_batch`` examples; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch; without them the layer is BatchNorm.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation, see :func:`anybatch.weigh_examples_`.
        sync: pool the batch's moments over the ranks of ``process_group`` (an attribute; torch's default group).

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's, running_var the total population variance; ``num_batches_tracked`` is where the ramp
        stands, so it resumes with the state_dict.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer.

    Source: algorithm 1 of the paper; the shared linear ramp and ``momentum_batch`` are ours.
    """

    r_max: float
    d_max: float
    ramp_from: int
    ramp_to: int
    momentum_batch: int | None

    repeatable = False  # what it corrects towards has moved

    def __init__(
        self,
        num_features: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        ramp_from: int = 1000,
        ramp_to: int = 5000,
        momentum_batch: int | None = 32,
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
            r_max=r_max,
            d_max=d_max,
            ramp_from=ramp_from,
            ramp_to=ramp_to,
            momentum_batch=momentum_batch,
            sync=sync,
        )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_number("BatchRenorm", "r_max", options["r_max"], 1)
        check_number("BatchRenorm", "d_max", options["d_max"], 0)
        check_whole("BatchRenorm", "ramp_from", options["ramp_from"], 0)
        check_whole("BatchRenorm", "ramp_to", options["ramp_to"], 0)
        check_whole("BatchRenorm", "momentum_batch", options["momentum_batch"], none=True)
        first, last = options["ramp_from"], options["ramp_to"]
        if last < first:
            raise AnybatchError(f"BatchRenorm: ramp_to={last} is before ramp_from={first}; give at least {first}")

    def normalise(self, y: Tensor) -> Tensor:
        """By the batch's moments with the correction; they go into the running statistics afterwards."""
        y, mean, var = measure(y)
        batch = self.whole(mean, var, y)
        now = batch.now
        if self._replay.is_second_run():
            correction = self._replay.recall(now.mean, 0)
        else:
            correction = self._correction(now)
            self._replay.remember(now.mean, 0, correction)
        self.track_(now, batch.examples, total=True, momentum_batch=self.momentum_batch)
        mean, var = batch.mean, batch.var
        if correction is None:
            return normalise_by(y, mean, var, self.weight, self.bias, self.eps)
        # gamma * (y_hat * r + d) + beta = (gamma * r) * y_hat + (gamma * d + beta)
        scale, shift = correction if self.weight is None else (self.weight * c for c in correction)
        return normalise_by(y, mean, var, scale, shift if self.bias is None else shift + self.bias, self.eps)

    def _correction(self, now: Moments) -> tuple[Tensor, Tensor] | None:
        """The corrections r and d (C,); None without running statistics."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return None
        numbers: tuple[Any, ...] = (self.r_max - 1, self.d_max, self.eps)
        if torch.compiler.is_compiling():  # numbers may be symbols there, which once() cannot pass on
            numbers = tuple(now.mean.new_full((), number) for number in numbers)
        corrected: tuple[Tensor, Tensor] = once(self._corrected, now.mean, now.var, *numbers)
        return corrected

    @torch.no_grad()
    def _corrected(self, mean: Tensor, var: Tensor, r_beyond: Any, d_max: Any, eps: Any) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        ramped = (self.num_batches_tracked + (1 - self.ramp_from)).to(mean.dtype)
        ramp = (ramped / max(self.ramp_to - self.ramp_from, 1)).clamp(0, 1)
        most, furthest = 1 + r_beyond * ramp, d_max * ramp
        sigma = (self.running_var + eps).sqrt()
        r = ((var + eps).sqrt() / sigma).clamp(1 / most, most)
        d = ((mean - self.running_mean) / sigma).clamp(-furthest, furthest)
        return r, d


@dataclass(frozen=True)
class BatchRenorm(NormConfig):
    """Batch Renormalization; every option as in :class:`anybatch.nn.BatchRenormalization`.

    Args:
        r_max: largest correction of the scale, as a factor.
        d_max: largest correction of the shift, in running standard deviations.
        ramp_from: training forwards of plain BatchNorm at first.
        ramp_to: training forward from which the bounds are ``r_max`` and ``d_max``.
        momentum_batch: examples at which momentum is torch's; None: every forward counts the same.
        sync: pool moments over ranks.
    """

    layer: ClassVar[type[NormLayer]] = BatchRenormalization

    r_max: float = 3.0
    d_max: float = 5.0
    ramp_from: int = 1000
    ramp_to: int = 5000
    momentum_batch: int | None = 32
    sync: bool = False
