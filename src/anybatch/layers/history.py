"""The history of a Cross-Iteration BatchNorm layer: one preallocated ring, on the device of its input.

Training state, like an optimizer's moments: neither parameter nor buffer. One slot of the ring is always free; a batch
is written there and only a batch with finite moments moves the ring on, so a bad one costs no old entry, and nobody
waits for the device to find out. Letters: T slots (= window), C channels, G groups, K values of a patch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.linear_map import LinearMap
from ..core.moments import Moments, compute_dtype
from ..core.pooled import Averages
from ..core.taylor import Entries
from ..errors import AnybatchError
from .feed import FedLayer

__all__ = ["History", "HistoryLayer"]

_FIELDS = ("count", "scalars", "patch", "covariance", "slot", "forwards", "reductions", "backwards")


class History:
    """The last window - 1 batches of one norm behind one map, and the running averages of its two reductions.

    State: count (T,), scalars (4, C, T): mean, var, mean_at, var_at of :class:`Entries`, patch (G, T, K),
    covariance (C, T, K), slot (1,) int64: the free one, forwards () int64, reductions (2, C), backwards ().
    """

    @torch.inference_mode(False)  # a forward in inference mode must not make a ring that training cannot write
    def __init__(self, window: int, channels: int, groups: int, k: int, like: Tensor) -> None:
        zeros = like.new_zeros
        self.count = zeros(window)
        self.scalars = zeros(4, channels, window)
        self.patch = zeros(groups, window, k)
        self.covariance = zeros(channels, window, k)
        self.slot = zeros(1, dtype=torch.int64)
        self.forwards = zeros((), dtype=torch.int64)
        self.reductions = zeros(2, channels)
        self.backwards = zeros(())

    def entries(self) -> Entries:
        """The ring as the core reads it; empty slots have size 0."""
        mean, var, mean_at, var_at = self.scalars.unbind(0)
        return Entries(self.count, mean, var, mean_at, var_at, self.patch, self.covariance)

    def push_(self, now: Moments, ok: Tensor, mean_at: Tensor, var_at: Tensor, patch: Tensor, cov: Tensor) -> None:
        """Write a batch into the free slot, and free the oldest if ``ok`` (a bool on the device)."""
        # A free slot is multiplied by zero, so what it holds must be finite, squared too.
        scalars = torch.stack([now.mean, now.var, mean_at, var_at])
        self.scalars.index_copy_(2, self.slot, torch.where(ok, scalars, 0.0).unsqueeze(2))
        if patch.numel():
            self.patch.index_copy_(1, self.slot, torch.where(ok, patch, 0.0).unsqueeze(1))
            self.covariance.index_copy_(1, self.slot, torch.where(ok, cov, 0.0).unsqueeze(1))
        if isinstance(now.size, Tensor):  # index_fill_ would wait for its value
            self.count.index_copy_(0, self.slot, now.size.to(self.count.dtype).view(1))
        else:
            self.count.index_fill_(0, self.slot, float(now.size))
        self.slot.add_(ok).remainder_(self.count.shape[0])
        self.count.index_fill_(0, self.slot, 0.0)
        self.forwards.add_(ok)

    def tensors(self) -> list[Tensor]:
        """All there is."""
        return [getattr(self, field) for field in _FIELDS]

    def like(self, tensor: Tensor) -> "History":
        """Move to the device and dtype that a batch's statistics have, if they are others."""
        if self.count.device != tensor.device or self.count.dtype != tensor.dtype:
            for field in _FIELDS:
                old = getattr(self, field)
                setattr(self, field, old.to(tensor.device, tensor.dtype if old.is_floating_point() else None))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors by name."""
        return {field: getattr(self, field).clone() for field in _FIELDS}

    def take(self, state: Any, where: str) -> "History":
        """Fill this fresh history with what :meth:`state_dict` gave.

        Raises:
            AnybatchError: a tensor is missing, of another shape or kind, or the free slot is not in the ring.
        """
        if not isinstance(state, Mapping):
            raise AnybatchError(f"history of {where}: a {type(state).__name__} is no history; save it anew")
        for field in _FIELDS:
            mine, saved = getattr(self, field), state.get(field)
            if not isinstance(saved, Tensor):
                raise AnybatchError(f"history of {where}: no tensor {field!r} in it; save it anew")
            if saved.shape != mine.shape or saved.is_floating_point() != mine.is_floating_point():
                raise AnybatchError(
                    f"history of {where}: {field!r} is {saved.dtype} of shape {tuple(saved.shape)} and the layer's has "
                    f"shape {tuple(mine.shape)}; convert the model with the config it was saved with"
                )
            setattr(self, field, saved.to(mine.device, copy=True))
        if not 0 <= int(self.slot) < len(self.count):
            raise AnybatchError(f"history of {where}: slot {int(self.slot)} of {len(self.count)}; save it anew")
        return self


class HistoryLayer(FedLayer):
    """A norm layer that keeps the last ``window`` batches, one history a followed map."""

    window: int
    compensate: bool
    average_reductions: int
    loss_scale: Tensor | None = None  # of a gradient scaler, see anybatch.attach

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By the index of the followed map (-1: none): the entries of one map say nothing about another's.
        self.histories: dict[int, History] = {}

    @property
    def compensates(self) -> bool:
        """Whether past moments are carried over to today's weights."""
        return self.compensate and self.window > 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without history: it is training state, see :func:`anybatch.history_state_dict`."""
        return {**super().__getstate__(), "histories": {}, "_stash": None, "loss_scale": None}

    def reset_running_stats(self) -> None:
        """As in torch; also forgets the history."""
        super().reset_running_stats()
        self.histories = {}

    def history_of(self, index: int) -> History:
        """The history of a map (-1: none), made by the first training forward."""
        if torch.compiler.is_compiling():  # torch's compiler is not imported before it is used
            from torch._dynamo.comptime import comptime

            from .compiling import make_histories

            comptime(make_histories)
        elif index not in self.histories:
            self.histories[index] = self._fresh(index)
        return self.histories[index]

    def make_histories(self) -> None:
        """Make the history of every map that has none."""
        for index in range(len(self._links)) if self._links else (-1,):
            if index not in self.histories:
                self.histories[index] = self._fresh(index)

    def scaled_by(self, scale: Tensor | None) -> None:
        """Note what the loss is multiplied by."""
        self.loss_scale = scale

    def averages(self, history: History) -> Averages:
        """What a backward moves, and by how much the loss is scaled."""
        return Averages(history.reductions, history.backwards, self.average_reductions, self.loss_scale)

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
        own = next(iter((*self.parameters(), *self.buffers())), torch.empty(0))
        like = torch.empty(0, device=own.device, dtype=compute_dtype(own.dtype))
        if index < 0 or not self.compensates:
            return History(self.window, self.num_features, 1, 0, like)
        link = self._links[index]
        geometry = LinearMap.of(link.map)
        assert geometry is not None  # follows() has seen to it
        channels, k = link.rows
        return History(self.window, channels, geometry.groups, k, like)
