"""Cross-Iteration Batch Normalization (Yao, Cao, Zheng, Huang, Lin; CVPR 2021; arXiv 2002.05712).

The norm after a linear map y = W p + b, at weights W_t, over a window of k batches, the current one included:

    mu_tau(W_t), var_tau(W_t)   moments of the last k - 1 batches carried over to W_t (core/taylor.py)
    mu_bar  = sum_tau s_tau mu_tau(W_t)
    var_bar = sum_tau s_tau ( var_tau(W_t) + (mu_tau(W_t) - mu_bar)^2 )
    out     = gamma * y_hat + beta,   y_hat = (y - mu_bar) / sqrt(var_bar + eps)

with shares s_tau by sample count ('samples': still weights make this BatchNorm on the window's concatenation) or 1/k
('equal', the paper's). Evaluation is BatchNorm on the running statistics, so the layer folds into its map.

Backward (core/pooled.py): 'current', the paper's, holds the history constant. 'history' lets the loss flow through the
carried moments into W, which makes it blind to the scale of W again: <dL/dW, W> = 0 up to eps, as BatchNorm has it. For
the layers before, no history carries what later batches will take from this one, through the moments it is pooled into;
it is estimated by gamma / sqrt(var_bar + eps) (1 - s) (-R1 - y_hat R2), with s the current batch's share and R1, R2 the
averages of E[g], E[g y_hat] over ``average_reductions`` backwards.

Deviations from the paper, each an option: the standard deviation is expanded instead of E[y^2] (``expansion``), the
gradient flows through the history (``gradient``), earlier layers get the averaged reductions too, entries pool by count
(``pooling``), and the running statistics' momentum counts examples (``momentum_batch``) and gives the total variance.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.affine import per_channel
from ..core.moments import channel_mean, moments, pool
from ..core.pooled import Batch, Pooled, normalise_pooled, spread
from ..core.ranks import pool_ranks
from ..core.taylor import Responses, carry, history_gradient, responses
from ..errors import AnybatchError
from .base import NormLayer
from .config import NormConfig
from .feed import Feed
from .history import History, HistoryLayer
from .options import check_choice, check_flag, check_whole
from .replay import first_run, once

__all__ = ["CBN", "CrossIterationBatchNorm"]


class CrossIterationBatchNorm(HistoryLayer):
    """Normalises (N, C, *) per channel by moments pooled over the last ``window`` batches, carried to today's weights.

    out = gamma * (y - mu_bar) / sqrt(var_bar + eps) + beta, the equations at the top of this file.

    Args:
        num_features: C.
        window: k, batches pooled, the current one included; 1 is torch's BatchNorm in every respect.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch of ``momentum_batch`` examples; None for a cumulative average.
        affine: whether the layer has gamma and beta.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        gradient: 'history' (through the carried moments) or 'current' (the paper's).
        compensate: carry past moments over to today's weights; False is naive CBN.
        pooling: 'samples' or 'equal'.
        expansion: 'deviation' or 'second_moment' (the paper's), what is expanded to first order.
        average_reductions: backwards over which the two reductions for earlier layers are averaged; 0 leaves them the
            current batch's own share.
        momentum_batch: examples of a batch at which ``momentum`` is torch's; a smaller batch of n moves the running
            statistics by 1 - (1 - momentum)^(n / momentum_batch). None: every forward counts the same, as in torch.
        running: 'total' (running_var is the total population variance) or 'torch' (average of Bessel variances).
        burn_in_steps: training forwards normalised by their own batch alone before the window is used.
        examples_per_group: a larger batch is taken as so many examples at a time, each group one entry of the history,
            as if they came one after another without a step between; None: the batch is one entry.
        alpha: the share of the example's own moments in evaluation, see :func:`anybatch.weigh_examples_`.
        sync: pool over the ranks of ``process_group`` too (an attribute; torch's default group): the moments are those
            of the ranks' batches together. Each rank keeps its part of the history.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's (running_var by ``running``), and outside of the state_dict the
        history, see :func:`anybatch.history_state_dict`.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer or is not what its map made.

    Source: section 3 of the paper; the history gradient, expansion of the deviation and averaged reductions are ours.
    """

    takes_single_values = True  # the window's
    gradient: str
    pooling: str
    average_reductions: int
    burn_in_steps: int
    examples_per_group: int | None

    def __init__(
        self,
        num_features: int,
        window: int = 8,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        alpha: float = 0.0,
        gradient: Literal["history", "current"] = "history",
        compensate: bool = True,
        pooling: Literal["samples", "equal"] = "samples",
        expansion: Literal["deviation", "second_moment"] = "deviation",
        average_reductions: int = 128,
        momentum_batch: int | None = 32,
        running: Literal["total", "torch"] = "total",
        burn_in_steps: int = 0,
        examples_per_group: int | None = None,
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            alpha=alpha,
            window=window,
            gradient=gradient,
            compensate=compensate,
            pooling=pooling,
            expansion=expansion,
            average_reductions=average_reductions,
            momentum_batch=momentum_batch,
            running=running,
            burn_in_steps=burn_in_steps,
            examples_per_group=examples_per_group,
            sync=sync,
        )
        self.second_moment = expansion == "second_moment"
        # A window of one batch is torch's BatchNorm, its momentum and running variance included.
        self.momentum_batch = momentum_batch if window > 1 else None
        self.torch_running = running == "torch" or window == 1

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        choices = {
            "gradient": ("history", "current"),
            "pooling": ("samples", "equal"),
            "expansion": ("deviation", "second_moment"),
            "running": ("total", "torch"),
        }
        for name, known in choices.items():
            check_choice("CBN", name, options[name], known)
        check_flag("CBN", "compensate", options["compensate"])
        for name, least in {"window": 1, "average_reductions": 0, "burn_in_steps": 0}.items():
            check_whole("CBN", name, options[name], least)
        for name in ("momentum_batch", "examples_per_group"):
            check_whole("CBN", name, options[name], none=True)
        if options.get("sync") and options["examples_per_group"]:
            raise AnybatchError("CBN: sync=True with examples_per_group, of which ranks may have unequal numbers")

    def normalise(self, y: Tensor) -> Tensor:
        """By the pooled moments; the batch's own go into the history and the running statistics."""
        return self.standardise(y, self.weight, self.bias)

    def standardise(self, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """:meth:`normalise` with other affine parameters than the layer's."""
        index, feed = self.take_feed(y)
        size = self.examples_per_group or len(y)
        parts = [
            self._part(part, index, feed and feed._replace(x=feed.x[i * size : (i + 1) * size]), weight, bias)
            for i, part in enumerate(torch.split(y, size) if len(y) > size else [y])
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _part(self, y: Tensor, index: int, feed: Feed | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        batch, examples = self._measure(y.detach(), feed)
        history = self.history_of(index).like(batch.now.mean)
        pooled = self._replay.recall(batch.now.mean, index) if self._replay.is_second_run() else None
        if pooled is None:
            pooled, at = once(self._pool, history, batch)
            self._push(history, batch, pooled, at, examples)
            self._replay.remember(batch.now.mean, index, pooled)
        averages = self.averages(history) if self.average_reductions and batch.patch.numel() else None
        on_backward = None if torch.compiler.is_compiling() else self._replay.backward_begins
        return normalise_pooled(y, weight, bias, self.eps, batch, pooled, averages, self.group, on_backward)

    def _measure(self, y: Tensor, feed: Feed | None) -> tuple[Batch, int | Tensor]:
        """The batch behind its map, and its number of examples, both over all ranks."""
        own = moments(y)
        whole = pool_ranks(*own, len(y), self.group)
        now = whole.now
        dtype, channels = now.mean.dtype, self.num_features
        if feed is None or not self.compensates:
            nothing = now.mean.new_zeros(channels, 0)
            return Batch(now, nothing, None, nothing[:1], nothing), whole.examples
        rows, bias = feed.geometry.rows(feed.weight).to(dtype), None if feed.bias is None else feed.bias.to(dtype)
        if not y.numel():
            nothing = torch.zeros_like(rows)
            return Batch(now, rows, bias, nothing[: feed.geometry.groups], nothing), whole.examples
        with torch.no_grad():
            patch = feed.geometry.mean_patch(feed.x, tuple(y.shape[2:])).to(dtype)
            # The rounded mean is not quite the mean, and at a mean of 1e4 what is left would drown the covariance.
            centred = y.to(dtype) - per_channel(own.mean, y)
            covariance = feed.geometry.covariance(feed.x, centred, feed.weight).to(dtype)
            covariance -= spread(patch, channel_mean(centred))
            if whole.apart is not None and whole.share is not None:
                covariance = (covariance + spread(patch, whole.apart)) * whole.share
                patch = patch * whole.share
        return Batch(now, rows, bias, patch, covariance), whole.examples

    @torch.no_grad()
    def _pool(self, history: History, batch: Batch) -> tuple[Pooled, Responses]:
        """What the batch is normalised by, and its own responses to the weights."""
        now, samples = batch.now, self.pooling == "samples"
        past = history.entries()
        at = responses(past, batch.patch, batch.covariance, batch.rows, batch.bias, self.group)
        carried = carry(past, at[0], self.second_moment)
        used = past.sizes if samples else past.sizes.sign()
        used = used * (history.forwards >= self.burn_in_steps)
        own = used.new_ones(1) * (now.size if samples else 1)
        weights = torch.cat([own, used])
        shares = weights / weights.sum().clamp_min(1)
        means = torch.cat([now.mean[:, None], carried.mean], 1)
        mean, var = pool(means, torch.cat([now.var[:, None], carried.var], 1), shares)
        share, few = shares[0], isinstance(now.size, Tensor) or now.size < 2
        if few and self.running_mean is not None and self.running_var is not None:
            # One value has no variance of its own: without history it is normalised by the running statistics.
            alone = (share == 1) & (now.size < 2)
            mean, var = torch.where(alone, self.running_mean, mean), torch.where(alone, self.running_var, var)
            share = share * ~alone
        pooled = Pooled(mean, var, share, None, None)
        if self.gradient == "history":
            mean_by_weight, var_by_weight, var_by_bias = history_gradient(past, carried, shares[1:], mean)
            pooled = Pooled(mean, var, share, (mean_by_weight, var_by_weight), (shares[1:].sum(), var_by_bias))
        return pooled, at[1]

    @torch.no_grad()
    def _push(self, history: History, batch: Batch, pooled: Pooled, at: Responses, examples: int | Tensor) -> None:
        now = batch.now
        sums = (now.mean + now.var + at.mean[:, 0] + at.var[:, 0]).sum()
        if torch.compiler.is_compiling() and pooled.by_weight is not None and pooled.by_bias is not None:
            # Needed by the forward too, or a compiler computes them after the history has changed, in the backward.
            sums = sums + torch.stack([t.sum() for t in (*pooled.by_weight, *pooled.by_bias)]).sum()
        ok = torch.isfinite(sums)
        ok = first_run(ok & (now.size > 0) if isinstance(now.size, Tensor) else ok, repeatable=False)
        history.push_(now, ok, at.mean[:, 0], at.var[:, 0], batch.patch, batch.covariance)
        self.track_(now, examples, ok, total=not self.torch_running, momentum_batch=self.momentum_batch)


@dataclass(frozen=True)
class CBN(NormConfig):
    """Cross-Iteration BatchNorm; every option as in :class:`anybatch.nn.CrossIterationBatchNorm`.

    Args:
        window: batches pooled, the current one included.
        gradient: 'history' or 'current'.
        compensate: carry past moments over to today's weights.
        pooling: 'samples' or 'equal'.
        expansion: 'deviation' or 'second_moment'.
        average_reductions: backwards over which the reductions for earlier layers are averaged; 0 for none.
        momentum_batch: examples at which momentum is torch's; None: every forward counts the same.
        running: 'total' or 'torch'.
        burn_in_steps: training forwards of plain BatchNorm at first.
        examples_per_group: a larger batch is taken as so many examples at a time; None: as one.
        sync: pool moments over ranks.
    """

    layer: ClassVar[type[NormLayer]] = CrossIterationBatchNorm

    window: int = 8
    gradient: Literal["history", "current"] = "history"
    compensate: bool = True
    pooling: Literal["samples", "equal"] = "samples"
    expansion: Literal["deviation", "second_moment"] = "deviation"
    average_reductions: int = 128
    momentum_batch: int | None = 32
    running: Literal["total", "torch"] = "total"
    burn_in_steps: int = 0
    examples_per_group: int | None = None
    sync: bool = False

    @classmethod
    def paper(cls, window: int = 8, burn_in_steps: int = 0) -> "CBN":
        """Every switch as the paper and its released code have it (eps inside the root, as BatchNorm)."""
        return cls(
            window=window,
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
        return self.compensate and self.window > 1
