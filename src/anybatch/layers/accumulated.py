"""Moments accumulated with the gradient, after CmBN (Bochkovskiy, Wang, Liao 2020; arXiv 2004.10934).

An accumulated batch is what an optimizer sees between two steps: S micro-batches, m_j values a channel each. The i-th
is normalised by the moments of micro-batches 1..i taken together:

    s_j     = m_j / (m_1 + ... + m_i)
    mu_bar  = sum_j s_j mu_j
    var_bar = sum_j s_j ( var_j + (mu_j - mu_bar)^2 )
    out     = gamma * (y - mu_bar) / sqrt(var_bar + eps) + beta

Variances are population variances, eps is inside the root. The weights stand still between two steps, so nothing is
carried over: the last micro-batch is normalised by the exact moments of all that the layer was given in the accumulated
batch, and S = 1 is torch's BatchNorm in every respect. The graphs of micro-batches 1..i-1 are gone when the i-th runs.
Backward, with y_hat by the pooled moments, a = gamma / sqrt(var_bar + eps) and E over micro-batch i:

    'whole' (CmBN's):  dy = a ( g - E[g] - y_hat E[g y_hat] ), BatchNorm's with the pooled moments in its place: what
                       the other micro-batches take from this one is estimated to be what it takes itself
    'share':           dy = a ( g - s_i E[g] - ... ), the derivative with micro-batches 1..i-1 held constant, which
                       leaves out what they give and is not blind to the scale of the weights before the layer

Running statistics move once an accumulated batch, by torch's momentum and towards its Bessel-corrected moments as far
as they are known; every micro-batch takes that move back and makes it anew, so that evaluation is right at any time.
What others wrote there in the meantime is no such move: it is what the move starts from then on.

Deviations from CmBN: pooling by number of values and by parts instead of a running average, so unequal micro-batches
count as what they are; a new accumulated batch starts by the optimizer's own hook.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.moments import Moments, pool
from ..core.step import measure, normalise_by
from ..core.tensors import version
from ..errors import AnybatchError
from .base import NormLayer
from .config import NormConfig
from .options import check_choice
from .replay import as_they_are, first_run

__all__ = ["AccumulatedBN", "AccumulatedBatchNorm"]


class _Gathered(NamedTuple):
    """What the micro-batches since the last step have given, together."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,) population
    size: Tensor  # () values a channel; 0 where no micro-batch was finite


class _Batch(NamedTuple):
    """An accumulated batch so far; nothing in it is changed in place."""

    pool: _Gathered
    weight: Tensor | None  # gamma when it began, the object itself
    version: int  # of gamma then
    before: tuple[Tensor, ...] = ()  # the running statistics when it began
    left: tuple[Tensor, ...] = ()  # and as the last micro-batch left them


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
        gradient: 'whole' or 'share', the equations at the top of this file.
        sync: pool the batch's moments over the ranks of ``process_group`` (an attribute; torch's default group).

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's; ``num_batches_tracked`` counts accumulated batches. What was gathered since the last
        step is in no state_dict, copy or pickle: they start with a new accumulated batch, unattached.

    Raises:
        AnybatchError: an option out of its range, an input that does not fit the layer, a second training forward
            while no optimizer tells the layer when it steps, or one after gamma changed without a word from any.

    Source: CmBN of the paper; pooling by parts and by count, and the running statistics are ours.
    """

    takes_single_values = True  # normalised by the pool, by the running statistics while there is none
    gradient: str

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
        gradient: Literal["whole", "share"] = "whole",
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            gradient=gradient,
            sync=sync,
        )
        self._optimizers = 0
        self._start_anew()

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_choice("AccumulatedBN", "gradient", options["gradient"], ("whole", "share"))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with a new accumulated batch, unattached."""
        return {**super().__getstate__(), "_optimizers": 0, "_batch": None}

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
        self._batch: _Batch | None = None

    def normalise(self, y: Tensor) -> Tensor:
        """By the moments of the accumulated batch so far; this micro-batch's join them."""
        y, mean, var = measure(y)
        batch = self.whole(mean, var, y)
        mean, var, now = batch.mean, batch.var, batch.now
        if self._replay.is_second_run():
            known, values = self._replay.recall(now.mean, 0)
        else:
            if not self._optimizers and not torch.is_grad_enabled():
                self._start_anew()  # no gradient that could be accumulated: swa_utils.update_bn
            with torch.no_grad():
                known, values = self._known(now)
                self._gather(now, batch.examples)
            self._replay.remember(now.mean, 0, (known, values))
        if known is not None:
            own_mean, own_var = mean, var
            mean, var = _together(mean, var, values, known)
            if self.gradient == "whole" and (isinstance(values, Tensor) or values):
                live = values.sign() if isinstance(values, Tensor) else 1
                mean, centre = _with_gradient(mean, own_mean, live), mean.detach()
                var = _with_gradient(var, own_var + (own_mean - centre).square(), live)
        return normalise_by(y, mean, var, self.weight, self.bias, self.eps)

    def _known(self, now: Moments) -> tuple[_Gathered | None, int | Tensor]:
        """What a micro-batch is pooled with, and the number of values it adds to that."""
        if self._batch is not None:
            self._check_signal(self._batch)
            return self._batch.pool, now.size
        several = not isinstance(now.size, Tensor) and now.size > 1
        if several or self.running_mean is None or self.running_var is None:
            return None, now.size
        # One value has no variance of its own, and there is nothing to pool it with.
        mean, var = as_they_are(self.running_mean, self.running_var)
        if not isinstance(now.size, Tensor):
            return _Gathered(mean, var, mean.new_ones(())), 0
        alone = (now.size < 2).to(mean.dtype)
        return _Gathered(mean, var, alone), now.size * (1 - alone)

    def _check_signal(self, batch: _Batch) -> None:
        """Refuse to go on with a batch whose end nobody would tell, or nobody has told."""
        name, weight = f"{type(self).__name__}({self.num_features})", self._trained_weight()
        if not self._optimizers:
            raise AnybatchError(
                f"{name}: a second training forward, and no optimizer tells the "
                "layer when it steps; call ab.attach(model, optimizer) once, after converting and before training"
            )
        if weight is not None and weight is batch.weight and version(weight) != batch.version:
            raise AnybatchError(
                f"{name}: its weight changed since the last step of an attached optimizer, and what was gathered "
                "belongs to the old one; call ab.attach(model, optimizer) with the optimizer that makes the steps, "
                "one that moves the weights only at their end"
            )

    def _trained_weight(self) -> Tensor | None:
        weight = None if torch.compiler.is_compiling() else self._parameters.get("weight")
        return weight if weight is not None and weight.requires_grad else None

    def _gather(self, now: Moments, examples: int | Tensor) -> None:
        ok = first_run(torch.isfinite((now.mean + now.var).sum()), repeatable=False)
        mean, var = torch.where(ok, now.mean, 0.0), torch.where(ok, now.var, 0.0)
        size = now.size * ok.to(now.mean.dtype)
        batch = self._batch
        if batch is None:
            weight = self._trained_weight()
            batch = _Batch(_Gathered(mean, var, size), weight, 0 if weight is None else version(weight))
        else:
            mean, var = _together(mean, var, size, batch.pool)
            batch = batch._replace(pool=_Gathered(mean, var, batch.pool.size + size))
        self._batch = self._tracked(batch, examples)

    def _tracked(self, batch: _Batch, examples: int | Tensor) -> _Batch:
        """The batch, its move of the running statistics made anew."""
        if not self.track_running_stats or self.running_mean is None:
            return batch
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        statistics = (self.running_mean, self.running_var, self.num_batches_tracked)
        if batch.left:
            old = zip(statistics, batch.left, batch.before, strict=True)
            before = tuple(torch.where(t == left.to(t), b.to(t), t) for t, left, b in old)
            for t, b in zip(statistics, before, strict=True):
                t.copy_(b)
        else:
            before = tuple(t.clone() for t in statistics)
        pool = batch.pool
        self.track_(Moments(pool.mean, pool.var, pool.size), examples, pool.size > 1)
        return batch._replace(before=before, left=tuple(t.clone() for t in statistics))


def _with_gradient(value: Tensor, of: Tensor, live: int | Tensor) -> Tensor:
    """``value``, with ``live`` times the gradient of another tensor."""
    return value.detach() + live * (of - of.detach())


def _together(mean: Tensor, var: Tensor, values: Tensor | int, past: _Gathered) -> tuple[Tensor, Tensor]:
    """Moments (E, C) or (C,) of ``values`` values pooled with what was gathered."""
    mean_past, var_past = (p.to(mean).expand_as(mean) for p in past[:2])
    total = (past.size + values).clamp_min(1)
    shares = torch.stack([values / total, past.size / total]).to(mean)
    return pool(torch.stack([mean, mean_past], -1), torch.stack([var, var_past], -1), shares)


@dataclass(frozen=True)
class AccumulatedBN(NormConfig):
    """Moments accumulated with the gradient, as in :class:`anybatch.nn.AccumulatedBatchNorm`; see also ``attach``.

    Args:
        gradient: 'whole' (CmBN's) or 'share'.
        sync: pool moments over ranks.
    """

    layer: ClassVar[type[NormLayer]] = AccumulatedBatchNorm

    gradient: Literal["whole", "share"] = "whole"
    sync: bool = False
