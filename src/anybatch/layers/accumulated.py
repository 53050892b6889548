"""Moments accumulated with the gradient, after CmBN (Bochkovskiy, Wang, Liao 2020; arXiv 2004.10934).

An accumulated batch is what an optimizer sees between two steps: S micro-batches, m_j values a channel each. The i-th
is normalised by the moments of micro-batches 1..i taken together:

    s_j     = m_j / (m_1 + ... + m_i)
    mu_bar  = sum_j s_j mu_j
    var_bar = sum_j s_j ( var_j + (mu_j - mu_bar)^2 )
    out     = gamma * (y - mu_bar) / sqrt(var_bar + eps) + beta

Variances are population variances, eps is inside the root. The weights stand still between two steps, so nothing is
carried over: the last micro-batch is normalised by the exact moments of all that the layer was given in the accumulated
batch, and S = 1 is torch's BatchNorm in every respect. Backward: the loss flows through mu_i, var_i, which hold the
share s_i; the moments of micro-batches 1..i-1 are constants, for their graphs are gone. Running statistics move once an
accumulated batch, by torch's momentum and towards its Bessel-corrected moments as far as they are known; every
micro-batch takes that move back and makes it anew, so that evaluation is right at any time.

Deviations from CmBN: pooling by number of values and by parts instead of a running average, so unequal micro-batches
count as what they are; a new accumulated batch starts by the optimizer's own hook.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.moments import Moments, pool
from ..core.step import measure, normalise_by
from ..errors import AnybatchError
from .base import NormLayer
from .config import NormConfig
from .feed import eager

__all__ = ["AccumulatedBN", "AccumulatedBatchNorm"]


class _Gathered(NamedTuple):
    """What the micro-batches since the last step have given, together; never changed in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,) population
    size: Tensor  # () values a channel; 0 where no micro-batch was finite


class AccumulatedBatchNorm(NormLayer):
    """Normalises (N, C, *) per channel by the moments of all micro-batches since the optimizer's last step.

    out = gamma * (y - mu_bar) / sqrt(var_bar + eps) + beta, the equations at the top of this file.

    Call :func:`anybatch.attach` with the model and its optimizer once, before training: the optimizer's step starts a
    new accumulated batch.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of an accumulated batch; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation, see :func:`anybatch.weigh_examples_`.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's; ``num_batches_tracked`` counts accumulated batches. What was gathered since the last
        step is in no state_dict, copy or pickle: they start with a new accumulated batch, unattached.

    Raises:
        AnybatchError: an option out of its range, an input that does not fit the layer, or a second training forward
            while no optimizer tells the layer when it steps.

    Source: CmBN of the paper; pooling by parts and by count, the gradient and the running statistics are ours.
    """

    takes_single_values = True  # normalised by the pool, by the running statistics while there is none

    def __init__(
        self,
        num_features: int,
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
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype), bias=bias, alpha=alpha
        )
        self._optimizers = 0
        self._start_anew()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with a new accumulated batch, unattached."""
        return {**super().__getstate__(), "_optimizers": 0, "_past": None, "_before": ()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._start_anew()

    def reset_running_stats(self) -> None:
        """As in torch; also starts a new accumulated batch."""
        super().reset_running_stats()
        self._start_anew()

    def attached(self, by: int) -> None:
        """``by`` more optimizers (or fewer, if negative) will say when they step."""
        self._optimizers += by
        self._start_anew()

    def optimizer_stepped(self) -> None:
        """The weights have moved: a new accumulated batch starts."""
        self._start_anew()

    def _start_anew(self) -> None:
        self._past: _Gathered | None = None
        self._before: tuple[Tensor, ...] = ()  # the running statistics before this accumulated batch

    in_full_precision = eager(NormLayer.in_full_precision)

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the accumulated batch so far; this micro-batch's join them."""
        y, mean, var = measure(y)
        now = Moments(mean.detach()[0], var.detach()[0], y.numel() // y.shape[1])
        if self._replay.is_second_run():
            known, values = self._replay.recall(now.mean, 0)
        else:
            with torch.no_grad():
                known, values = self._known(now)
                self._gather(now, len(y))
            self._replay.remember(now.mean, 0, (known, values))
        if known is not None:
            mean, var = _together(mean, var, values, known)
        return normalise_by(y, mean, var, self.weight, self.bias, self.eps)

    def _known(self, now: Moments) -> tuple[_Gathered | None, int]:
        """What a micro-batch is pooled with, and the number of values it adds to that."""
        past = self._past
        if past is not None and not self._optimizers:
            raise AnybatchError(
                f"{type(self).__name__}({self.num_features}): a second training forward, and no optimizer tells the "
                "layer when it steps; call ab.attach(model, optimizer) once before training"
            )
        if past is None and now.size == 1 and self.running_mean is not None and self.running_var is not None:
            # One value has no variance of its own, and there is nothing to pool it with.
            return _Gathered(self.running_mean.clone(), self.running_var.clone(), now.mean.new_ones(())), 0
        return past, now.size

    def _gather(self, now: Moments, examples: int) -> None:
        ok = torch.isfinite((now.mean + now.var).sum())
        finite = Moments(torch.where(ok, now.mean, 0.0), torch.where(ok, now.var, 0.0), now.size)
        past, size = self._past, now.size * ok.to(now.mean.dtype)
        if past is None:
            self._past = _Gathered(finite.mean, finite.var, size)
        else:
            mean, var = _together(finite.mean, finite.var, size, past)
            self._past = _Gathered(mean, var, past.size + size)
        if not self.track_running_stats or self.running_mean is None:
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        statistics = (self.running_mean, self.running_var, self.num_batches_tracked)
        if past is None:
            self._before = tuple(t.clone() for t in statistics)
        for t, before in zip(statistics, self._before, strict=True):
            t.copy_(before)
        self.track_(Moments(*self._past[:2], now.size), examples, self._past.size > 1, values=self._past.size)


def _together(mean: Tensor, var: Tensor, values: Tensor | int, past: _Gathered) -> tuple[Tensor, Tensor]:
    """Moments (E, C) or (C,) of ``values`` values pooled with what was gathered."""
    mean_past, var_past = (p.to(mean).expand_as(mean) for p in past[:2])
    total = (past.size + values).clamp_min(1)
    shares = torch.stack([values / total, past.size / total]).to(mean)
    return pool(torch.stack([mean, mean_past], -1), torch.stack([var, var_past], -1), shares)


@dataclass(frozen=True)
class AccumulatedBN(NormConfig):
    """Moments accumulated with the gradient, as in :class:`anybatch.nn.AccumulatedBatchNorm`; see also ``attach``."""

    layer: ClassVar[type[NormLayer]] = AccumulatedBatchNorm
