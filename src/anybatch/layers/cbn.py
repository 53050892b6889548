"""Cross-Iteration Batch Normalization (Yao, Cao, Zheng, Huang, Lin; CVPR 2021; arXiv 2002.05712).

The norm after a linear map y = W p + b, at weights W_t, over a window of k batches, the current one included; k is
given, or N / n for a batch of n examples, so that it is always N examples that are pooled (``window_examples``):

    mu_tau(W_t), var_tau(W_t)   moments of past batches carried over to W_t
    mu_bar  = sum_tau s_tau mu_tau(W_t)
    var_bar = sum_tau s_tau ( var_tau(W_t) + (mu_tau(W_t) - mu_bar)^2 )
    out     = gamma * y_hat + beta,   y_hat = (y - mu_bar) / sqrt(var_bar + eps)

``kind`` 'ring', the paper's (core/taylor.py): the last k - 1 batches, each kept with its answer to the weights; shares
s_tau by sample count ('samples': still weights make this BatchNorm on the window's concatenation) or 1/k ('equal', the
paper's). 'exponential' (core/exponential.py): all past batches in the memory of one, with shares that fall by
1 - 1/k a batch, so that the newest has 1/k here too; it costs the same whatever k is. Its answer to the weights is read
from some ``positions`` of every ``refresh``-th batch. Evaluation is BatchNorm on the running statistics: it folds.

Backward (core/pooled.py): 'current', the paper's, holds the history constant. 'history' lets the loss flow through the
carried moments into W, which makes it blind to the scale of W again: <dL/dW, W> = 0 up to eps, as BatchNorm has it. For
the layers before, no history carries what later batches will take from this one, through the moments it is pooled into;
it is estimated by gamma / sqrt(var_bar + eps) (1 - s) (-R1 - y_hat R2), with s the current batch's share and R1, R2 the
averages of E[g], E[g y_hat] over ``average_reductions`` backwards, or as many as N examples make.

Deviations from the paper, each an option: exponential shares, sampled answers, expanding the deviation and not E[y^2],
the gradient through the history, averaged reductions, shares by count (``pooling``), running statistics whose momentum
counts examples (``momentum_batch``) and whose variance is the total one.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core.moments import Moments
from ..core.pooled import Map, Pooled, Response, Rule, normalise_pooled
from ..core.ranks import Whole, pool_ranks
from ..kernels.choose import passes_for
from .base import NormLayer
from .cbn_options import check_cbn
from .config import NormConfig
from .exponential import Exponential
from .feed import Feed, map_of
from .history import History, HistoryLayer, Today, as_computed
from .parts import can_go_at_once, normalise_parts
from .replay import first_run, once
from .ring import Ring

__all__ = ["CBN", "CrossIterationBatchNorm"]


class CrossIterationBatchNorm(HistoryLayer):
    """Normalises (N, C, *) per channel by moments pooled over the last ``window`` batches, carried to today's weights.

    out = gamma * (y - mu_bar) / sqrt(var_bar + eps) + beta, the equations at the top of this file.

    Args:
        num_features: C.
        window: k, batches pooled, the current one included; 1 is torch's BatchNorm in every respect. None: as many as
            ``window_examples`` make, of a ring 8.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch of ``momentum_batch`` examples; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        kind: 'exponential' or 'ring' (the paper's), how the past is kept.
        positions: output positions of a batch from which 'exponential' reads how moments answer to the weights: of
            outputs with over 1024 an example one in 64, up to 256, if that is more. None: all, as 'ring', at the cost
            of one weight gradient more.
        refresh: every so many batches 'exponential' reads them, and lets them stand for those between; 'ring': always.
        storage: of what 'exponential' keeps in the size of the weights: 'full' (as the statistics) or 'bfloat16'.
        gradient: 'history' (through the carried moments) or 'current' (the paper's).
        compensate: carry past moments over to today's weights; False is naive CBN.
        pooling: 'samples' or 'equal'.
        expansion: 'deviation' or 'second_moment' (the paper's), what is expanded to first order.
        average_reductions: backwards over which the two reductions for earlier layers are averaged; 0 leaves them the
            current batch's own share. None: as many as ``window_examples`` make.
        momentum_batch: examples of a batch at which ``momentum`` is torch's; a smaller batch of n moves the running
            statistics by 1 - (1 - momentum)^(n / momentum_batch). None: every forward counts the same, as in torch.
        running: 'total' (running_var is the total population variance) or 'torch' (average of Bessel variances).
        burn_in_steps: training forwards, or groups of a batch, normalised by themselves alone before the window is
            used.
        examples_per_group: a larger batch is taken as so many examples at a time, one entry of the history each, as if
            they came one after another without a step between; None: the batch is one entry.
        window_examples: N, examples pooled where no ``window`` is given: a batch of n counts n / N. From N examples on
            a batch stands alone, as in BatchNorm.
        alpha: the share of the example's own moments in evaluation, see :func:`anybatch.weigh_examples_`.
        sync: pool over the ranks of ``process_group`` too (an attribute; torch's default group), as if their batches
            were one. Each rank keeps its part of the history.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's (running_var by ``running``), beside it :func:`anybatch.history_state_dict`'s.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer or is not what its map made.

    Source: section 3 of the paper; the history gradient, expansion of the deviation and averaged reductions are ours.
    """

    takes_single_values = True  # the window's
    kind: str
    positions: int | None
    refresh: int
    storage: str
    gradient: str
    pooling: str
    window_examples: int
    burn_in_steps: int
    examples_per_group: int | None

    def __init__(
        self,
        num_features: int,
        window: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        alpha: float = 0.0,
        kind: Literal["exponential", "ring"] = "exponential",
        positions: int | None = 16,
        refresh: int = 2,
        storage: Literal["full", "bfloat16"] = "full",
        gradient: Literal["history", "current"] = "history",
        compensate: bool = True,
        pooling: Literal["samples", "equal"] = "samples",
        expansion: Literal["deviation", "second_moment"] = "deviation",
        average_reductions: int | None = None,
        momentum_batch: int | None = 32,
        running: Literal["total", "torch"] = "total",
        burn_in_steps: int = 0,
        examples_per_group: int | None = None,
        window_examples: int = 64,
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            window=window,
            kind=kind,
            positions=positions,
            refresh=refresh,
            storage=storage,
            gradient=gradient,
            compensate=compensate,
            pooling=pooling,
            expansion=expansion,
            average_reductions=average_reductions,
            momentum_batch=momentum_batch,
            running=running,
            burn_in_steps=burn_in_steps,
            examples_per_group=examples_per_group,
            window_examples=window_examples,
            sync=sync,
        )
        self.second_moment = expansion == "second_moment"
        self.window = window = 8 if window is None and kind == "ring" else window
        # A window of one batch is torch's BatchNorm, its momentum and running variance included.
        self.momentum_batch = momentum_batch if window != 1 else None
        self.torch_running = running == "torch" or window == 1

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_cbn(get_type_hints(CBN), **options)

    def normalise(self, y: Tensor) -> Tensor:
        """By the pooled moments; the batch's own go into the history and the running statistics."""
        return self.standardise(y, self.weight, self.bias)

    def standardise(self, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """:meth:`normalise` with other affine parameters than the layer's."""
        index, feed = self.take_feed(y)
        size = self.examples_per_group * self.rows_per_example if self.examples_per_group else len(y)
        if len(y) <= size:
            return self.normalise_one(y, index, feed, weight, bias)
        return normalise_parts(self, y, size, index, feed, weight, bias)

    def normalise_one(
        self, y: Tensor, index: int, feed: Feed | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """What :meth:`standardise` does with one entry of the history."""
        passes = passes_for(y)
        own = passes.moments(y.detach())
        whole = pool_ranks(*own, len(y), self.group)
        feed = feed if self.compensates else None
        now, map = (own if self.group is None else whole.now), map_of(feed, self.num_features, own.mean)
        history = self.history_of(index).like(now.mean)
        found = self._replay.recall(now.mean, index) if self._replay.is_second_run() else None
        if found is None:
            self._replay.tidy()
            found = self._first(y.detach(), own, now, whole, map, feed, history)
            self._replay.remember(now.mean, index, found)
        pooled, response = found
        averages = None if response is None else self.averages(history, whole.examples)
        begins = None if is_compiling() else self._replay.backward_begins
        args = (now, pooled, map, response, averages, self.group, begins, passes)
        return normalise_pooled(y, weight, bias, self.eps, *args)

    # once() needs gradients enabled: a checkpoint without them marks nothing.
    def _first(
        self, y: Tensor, own: Moments, now: Moments, whole: Whole, map: Map, feed: Feed | None, history: History
    ) -> tuple[Pooled, Response | None]:
        """What to normalise a batch by that is seen for the first time; it goes into history and statistics."""
        used = history.forwards >= self.burn_in_steps if self.burn_in_steps else None
        take = first_run(now.mean.new_ones((), dtype=torch.bool), repeatable=False) if is_compiling() else None
        today = Today(now, *map.held(), whole.share, used, take)
        share = self.share(whole.examples)
        seen = history.observe(y, own, now, whole, feed)
        pooled, response, ok, new = once(self._pool, history, today, seen, 1 - share)
        history.push_(today, ok, new)
        self.take_into_running_(now, whole.examples, ok)
        return pooled, response

    def take_into_running_(self, now: Moments, rows: int | Tensor, ok: Tensor | bool = True) -> None:
        """Take the moments of so many rows into the running statistics, if they are ``ok``."""
        examples = rows / self.rows_per_example
        self.track_(now, examples, ok, total=not self.torch_running, momentum_batch=self.momentum_batch)

    def rule(self, kept: Tensor | float) -> Rule:
        """How batches are pooled, beside which the past has the share ``kept``."""
        return Rule(kept, self.pooling == "samples", self.second_moment, self.gradient == "history", self.group)

    @torch.no_grad()
    def _pool(
        self, history: History, today: Today, seen: Any, kept: Tensor | float
    ) -> tuple[Pooled, Response | None, Tensor | bool, Any]:
        pooled, response, ok, new = history.pool(today, seen, self.rule(kept))
        pooled = self.unless_few(pooled, today.now.size, kept)
        if is_compiling():
            pooled, response = as_computed(pooled, response)
        return pooled, response, ok, new

    def new_history(self, channels: int, groups: int, k: int, like: Tensor) -> History:
        """Of the layer's kind."""
        if self.kind == "ring":
            assert self.window is not None
            return Ring(self.window, channels, groups, k, like)
        stored = None if self.storage == "full" else torch.bfloat16
        return Exponential(self.positions, self.refresh, stored, channels, groups, k, like)


@dataclass(frozen=True)
class CBN(NormConfig):
    """Cross-Iteration BatchNorm; every option as in :class:`anybatch.nn.CrossIterationBatchNorm`."""

    layer: ClassVar[type[NormLayer]] = CrossIterationBatchNorm

    window: int | None = None
    gradient: Literal["history", "current"] = "history"
    compensate: bool = True
    pooling: Literal["samples", "equal"] = "samples"
    expansion: Literal["deviation", "second_moment"] = "deviation"
    average_reductions: int | None = None
    momentum_batch: int | None = 32
    running: Literal["total", "torch"] = "total"
    burn_in_steps: int = 0
    examples_per_group: int | None = None
    sync: bool = False
    kind: Literal["exponential", "ring"] = "exponential"
    positions: int | None = 16
    storage: Literal["full", "bfloat16"] = "full"
    refresh: int = 2
    window_examples: int = 64

    @classmethod
    def paper(cls, window: int = 8, burn_in_steps: int = 0) -> "CBN":
        """Every switch as the paper and its released code have it (eps inside the root, as BatchNorm)."""
        return cls(
            window=window,
            kind="ring",
            gradient="current",
            pooling="equal",
            expansion="second_moment",
            average_reductions=0,
            momentum_batch=None,
            running="torch",
            burn_in_steps=burn_in_steps,
        )

    @property
    def needs_map(self) -> bool:
        """True where past moments are compensated."""
        return self.compensate and self.window != 1

    def in_groups(self, examples: int) -> "CBN | None":
        """With ``examples_per_group``; None where groups go one by one, which backward meets the other way round."""
        fits = can_go_at_once(self.kind, self.positions, self.needs_map) and not (self.sync or self.examples_per_group)
        return replace(self, examples_per_group=examples) if fits else None
