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

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.affine import Reductions, per_channel
from ..core.linear_map import LinearMap
from ..core.moments import Moments, bessel, channel_mean, compute_dtype, moments, pool, update_running_
from ..core.pooled import Batch, Pooled, normalise_pooled, spread
from ..core.taylor import carry, history_gradient, mean_response, variance_response
from ..errors import AnybatchError
from .feed import FedLayer, Feed, eager
from .history import History
from .replay import Replay

__all__ = ["CrossIterationBatchNorm"]

_CHOICES = {
    "gradient": ("history", "current"),
    "pooling": ("samples", "equal"),
    "expansion": ("deviation", "second_moment"),
    "running": ("total", "torch"),
}
_LEAST = {"window": 1, "average_reductions": 0, "burn_in_steps": 0, "momentum_batch": 1}


def check_options(**options: Any) -> None:
    """Refuse options out of range.

    Raises:
        AnybatchError: naming the option, its value and what it may be.
    """
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise AnybatchError(f"CBN: {name}={options[name]!r}; choose one of {', '.join(map(repr, choices))}")
    if not isinstance(options["compensate"], bool):
        raise AnybatchError(f"CBN: compensate={options['compensate']!r}; give True or False")
    for name, least in _LEAST.items():
        value = options[name]
        if name == "momentum_batch" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AnybatchError(f"CBN: {name}={value!r}; give a whole number of at least {least}")


class CrossIterationBatchNorm(FedLayer):
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

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's (running_var by ``running``), and outside of the state_dict the
        history, see :func:`anybatch.history_state_dict`.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer or is not what its map made.

    Source: section 3 of the paper; the history gradient, expansion of the deviation and averaged reductions are ours.
    """

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
        gradient: Literal["history", "current"] = "history",
        compensate: bool = True,
        pooling: Literal["samples", "equal"] = "samples",
        expansion: Literal["deviation", "second_moment"] = "deviation",
        average_reductions: int = 128,
        momentum_batch: int | None = 32,
        running: Literal["total", "torch"] = "total",
        burn_in_steps: int = 0,
    ) -> None:
        options = {
            "window": window,
            "gradient": gradient,
            "compensate": compensate,
            "pooling": pooling,
            "expansion": expansion,
            "average_reductions": average_reductions,
            "momentum_batch": momentum_batch,
            "running": running,
            "burn_in_steps": burn_in_steps,
        }
        check_options(**options)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, **options)
        self.window = window
        self.gradient = gradient
        self.compensate = compensate
        self.pooling = pooling
        self.second_moment = expansion == "second_moment"
        self.average_reductions = average_reductions
        # A window of one batch is torch's BatchNorm, its momentum and running variance included.
        self.momentum_batch = momentum_batch if window > 1 else None
        self.torch_running = running == "torch" or window == 1
        self.burn_in_steps = burn_in_steps
        # One history a followed map (-1: none): the entries of one map say nothing about another's.
        self.histories: dict[int, History] = {}
        self._replay = Replay()

    @property
    def _compensates(self) -> bool:
        return self.compensate and self.window > 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without history: it is training state, see :func:`anybatch.history_state_dict`."""
        return {**self.__dict__, "histories": {}, "_replay": Replay(), "_stash": None}

    def history_state(self) -> dict[str, Any]:
        """Copies of the histories' tensors, by the index of the followed map (-1: none)."""
        return {str(index): history.state_dict() for index, history in self.histories.items()}

    def read_history_state(self, state: Mapping[str, Any], where: str) -> dict[int, History]:
        """The histories in what :meth:`history_state` gave, checked against this layer; assign them to ``histories``.

        Raises:
            AnybatchError: tensors are missing or of another shape, or it is the history of a map the layer has not.
        """
        allowed = range(len(self._links)) if self._links else (-1,)
        histories = {}
        for key, saved in state.items() if isinstance(state, Mapping) else ():
            if key not in map(str, allowed):
                raise AnybatchError(
                    f"history of {where}: saved for map {key!r} of the norm, which has {len(self._links)}; convert the "
                    "model as it was converted when the state was saved"
                )
            histories[int(key)] = self._fresh(int(key)).take(saved, where)
        return histories

    def _fresh(self, index: int) -> History:
        """An empty history for a map (-1: none), on the layer's device."""
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        if index < 0 or not self._compensates:
            return History(
                self.window, torch.zeros(self.num_features, 0, device=device), torch.zeros(1, 0, device=device)
            )
        module = self._links[index].map
        geometry = LinearMap.of(module)
        assert geometry is not None  # follows() has seen to it
        rows = geometry.rows(module.weight.detach())  # type: ignore[operator]
        rows = rows.to(device, compute_dtype(rows.dtype))
        return History(self.window, rows, rows[: geometry.groups])

    def forward(self, y: Tensor) -> Tensor:
        """Normalise ``y`` (N, C, *); in training also take its moments into the history and running statistics."""
        self.check(y)
        if not self.training:
            return self.infer(y)
        return self.pass_empty(y) if y.numel() == 0 else self._normalise(y)

    @eager
    def _normalise(self, y: Tensor) -> Tensor:
        index, feed = self.take_feed(y)
        with torch.autocast(y.device.type, enabled=False):  # statistics are float32 or better
            batch = self._measure(y.detach(), feed)
            history = self._history_of(index, batch)
            pooled = self._replay.recall(batch.now.mean, index) if self._replay.is_second_run() else None
            if pooled is None:
                with torch.no_grad():
                    pooled = self._pool(history, batch)
                    self._push(history, batch, y.shape[0])
                self._replay.remember(batch.now.mean, index, pooled)
        over = self.average_reductions if batch.patch.numel() else 0
        replay = self._replay

        def on_backward(sums: Reductions, m: int) -> tuple[Tensor, Tensor] | None:
            replay.backward_begins()
            return history.average_(sums, m, over) if over else None

        return normalise_pooled(y, self.weight, self.bias, self.eps, batch, pooled, on_backward)

    def _measure(self, y: Tensor, feed: Feed | None) -> Batch:
        now = moments(y)
        dtype, channels = now.mean.dtype, self.num_features
        if feed is None or not self._compensates:
            return Batch(
                now, now.mean.new_zeros(channels, 0), None, now.mean.new_zeros(1, 0), now.mean.new_zeros(channels, 0)
            )
        with torch.no_grad():
            patch = feed.geometry.mean_patch(feed.x, tuple(y.shape[2:])).to(dtype)
            # The rounded mean is not quite the mean, and at a mean of 1e4 what is left would drown the covariance.
            centred = y.to(dtype) - per_channel(now.mean, y)
            covariance = feed.geometry.covariance(feed.x, centred, feed.weight).to(dtype)
            covariance -= spread(patch, channel_mean(centred))
        rows = feed.geometry.rows(feed.weight).to(dtype)
        return Batch(now, rows, None if feed.bias is None else feed.bias.to(dtype), patch, covariance)

    def _history_of(self, index: int, batch: Batch) -> History:
        history = self.histories.get(index)
        if history is None:
            history = self.histories[index] = History(self.window, batch.covariance, batch.patch)
        return history.like(batch.now.mean)

    def _pool(self, history: History, batch: Batch) -> Pooled:
        now, samples = batch.now, self.pooling == "samples"
        past = history.entries()
        carried = carry(past, batch.rows, batch.bias, self.second_moment)
        used = past.sizes if samples else past.sizes.sign()
        used = used * (history.forwards >= self.burn_in_steps)
        weights = torch.cat([used.new_full((1,), float(now.size) if samples else 1.0), used])
        shares = weights / weights.sum()
        means, variances = (
            torch.cat([now.mean[:, None], carried.mean], 1),
            torch.cat([now.var[:, None], carried.var], 1),
        )
        mean, var = pool(means, variances, shares)
        share = shares[0]
        if now.size == 1 and self.running_mean is not None and self.running_var is not None:
            # One value has no variance of its own: without history it is normalised by the running statistics.
            alone = share == 1
            mean, var = torch.where(alone, self.running_mean, mean), torch.where(alone, self.running_var, var)
            share = share * ~alone
        if self.gradient == "current":
            return Pooled(mean, var, share, None, None)
        mean_by_weight, var_by_weight, var_by_bias = history_gradient(past, carried, shares[1:], mean)
        return Pooled(mean, var, share, (mean_by_weight, var_by_weight), (shares[1:].sum(), var_by_bias))

    def _push(self, history: History, batch: Batch, examples: int) -> None:
        now = batch.now
        mean_at = mean_response(batch.patch.unsqueeze(1), batch.rows, batch.bias)[:, 0]
        var_at = variance_response(batch.covariance.unsqueeze(1), batch.rows)[:, 0]
        ok = torch.isfinite((now.mean + now.var + mean_at + var_at).sum())
        history.push_(now, ok, mean_at, var_at, batch.patch, batch.covariance)
        self._update_running(now, ok, examples)

    def _update_running(self, now: Moments, ok: Tensor, examples: int) -> None:
        if (
            not self.track_running_stats
            or self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked.add_(ok)
        moved = ok.to(now.mean.dtype)
        if self.momentum is None:
            rate = moved / self.num_batches_tracked.clamp_min(1)
        elif self.momentum_batch is None:
            rate = moved * self.momentum
        else:
            rate = moved * (1 - (1 - self.momentum) ** min(1.0, examples / self.momentum_batch))
        var = bessel(now.var, now.size) if self.torch_running else now.var
        mean, var = torch.where(ok, now.mean, 0.0), torch.where(ok, var, 0.0)
        update_running_(self.running_mean, self.running_var, mean, var, rate, total=not self.torch_running)
