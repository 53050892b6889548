"""What a Cross-Iteration BatchNorm layer remembers of past batches, on the device of its input.

Training state, like an optimizer's moments: neither parameter nor buffer. One kind of history a file; a batch whose
moments are not finite leaves it as it was, and nobody waits for the device to find out.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.linear_map import LinearMap
from ..core.moments import Moments, compute_dtype
from ..core.pooled import Averages, Pooled, Response, Rule
from ..core.ranks import Whole
from ..errors import AnybatchError
from .feed import FedLayer, Feed
from .replay import kept
from .surroundings import Surroundings

__all__ = ["History", "HistoryLayer", "Today", "as_computed"]

ENOUGH = 16  # values to pool that come one a batch, or as many as the window has


class Today(NamedTuple):
    """A batch, as it meets the past."""

    now: Moments  # over all ranks
    rows: Tensor  # W (C, K), detached; K = 0 where nothing is compensated
    bias: Tensor | None  # b (C,), detached
    part: Tensor | None  # this rank's share of the values, if it has not all
    used: Tensor | None  # a bool on the device, False: the past is not to be used yet
    take: Tensor | None  # a bool on the device, False: the batch is not to be taken in


def as_computed(pooled: Pooled, response: Response | None) -> tuple[Pooled, Response | None]:
    """What a graph's backward reads, as the forward computed it: by then the history has moved on.

    A covariance comes of a product of matrices, which a compiler computes once anyway unless one is a mere row.
    """
    if response is None:
        return Pooled(*kept(*pooled)), None
    row = response.covariance if len(response.covariance) == 1 else None
    patches, covariance, second, left, by, answer = response
    mean, var, share, row, patches, second, left, *by = kept(*pooled, row, patches, second, left, *by)
    return Pooled(mean, var, share), Response(patches, covariance if row is None else row, second, left, by, answer)


class History:
    """What one norm behind one map remembers, and the running averages of its two reductions.

    State: ``fields``, among them forwards () int64, reductions (2, C), backwards ().
    """

    fields: ClassVar[tuple[str, ...]] = ("forwards", "reductions", "backwards")
    forwards: Tensor
    reductions: Tensor
    backwards: Tensor

    def start(self, channels: int, like: Tensor) -> None:
        """Make the state that every kind has."""
        self.forwards = like.new_zeros((), dtype=torch.int64)
        self.reductions = like.new_zeros(2, channels)
        self.backwards = like.new_zeros(())

    @abstractmethod
    def observe(self, y: Tensor, own: Moments, now: Moments, whole: Whole, feed: Feed | None) -> Any:
        """What the map's outputs y (N, C, *) and inputs say of the moments' answer to the weights.

        Args:
            y: this rank's part of the batch, detached.
            own: its moments.
            now: those of all ranks.
            whole: the same, and this rank's part in them.
            feed: the map's run; None where nothing is compensated.
        """

    @abstractmethod
    def pool(self, today: Today, seen: Any, rule: Rule) -> tuple[Pooled, Response | None, Tensor | bool, Any]:
        """What to normalise by, the map's answer, whether the batch is finite, and what to :meth:`push_`."""

    @abstractmethod
    def push_(self, today: Today, ok: Tensor | bool, new: Any) -> None:
        """Take the batch in, if ``ok``."""

    def tensors(self) -> list[Tensor]:
        """All there is."""
        return [getattr(self, field) for field in self.fields]

    def like(self, tensor: Tensor) -> "History":
        """Move to the device and dtype that a batch's statistics have, if they are others."""
        before = self.backwards.dtype
        if self.backwards.device != tensor.device or before != tensor.dtype:
            for field in self.fields:  # what is counted or stored in another dtype than the statistics stays so
                old = getattr(self, field)
                setattr(self, field, old.to(tensor.device, tensor.dtype if old.dtype == before else None))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors by name."""
        return {field: getattr(self, field).clone() for field in self.fields}

    def take(self, state: Any, where: str) -> "History":
        """Fill this fresh history with what :meth:`state_dict` gave.

        Raises:
            AnybatchError: a tensor is missing, of another shape or kind, or holds what cannot be.
        """
        if not isinstance(state, Mapping):
            raise AnybatchError(f"history of {where}: a {type(state).__name__} is no history; save it anew")
        if set(state) != set(self.fields) and all(isinstance(t, Tensor) for t in state.values()):
            raise AnybatchError(
                f"history of {where}: it has {', '.join(sorted(state))} and the layer keeps "
                f"{', '.join(sorted(self.fields))}; convert the model with the config (kind=...) it was saved with"
            )
        for field in self.fields:
            mine, saved = getattr(self, field), state.get(field)
            if not isinstance(saved, Tensor):
                raise AnybatchError(f"history of {where}: no tensor {field!r} in it; save it anew")
            if saved.shape != mine.shape or saved.is_floating_point() != mine.is_floating_point():
                raise AnybatchError(
                    f"history of {where}: {field!r} is {saved.dtype} of shape {tuple(saved.shape)} and the layer's has "
                    f"shape {tuple(mine.shape)}; convert the model with the config it was saved with"
                )
            setattr(self, field, saved.to(mine.device, mine.dtype, copy=True))
        return self


class HistoryLayer(FedLayer):
    """A norm layer that remembers past batches, one history a followed map."""

    window: int | None
    window_examples: int
    compensate: bool
    average_reductions: int | None
    loss_scale: Tensor | None = None  # of a gradient scaler, see anybatch.attach

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By the index of the followed map (-1: none): the batches of one map say nothing about another's.
        self.histories: dict[int, History] = {}

    @property
    def compensates(self) -> bool:
        """Whether past moments are carried over to today's weights."""
        return self.compensate and self.window != 1

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

    def meet(self, around: Surroundings) -> None:
        """Follow the maps, and take note of how many rows of an input belong to one example."""
        super().meet(around)
        if around.rows is not None:
            self.rows_per_example = around.rows

    @property
    def note(self) -> str:
        """Where that is not one."""
        return f"{self.rows_per_example} rows of its input count as one example" if self.rows_per_example > 1 else ""

    def share(self, examples: int | Tensor) -> Tensor | float:
        """What so many examples have of a full window, at most all of it."""
        if self.window is not None:
            return 1 / self.window
        return self._of_window_examples(examples)

    def _of_window_examples(self, examples: int | Tensor) -> Tensor | float:
        full = examples / (self.window_examples * self.rows_per_example)
        return full.clamp_max(1) if isinstance(full, Tensor) else min(1.0, full)

    def unless_few(self, pooled: Pooled, size: Tensor | float, past: Tensor | float) -> Pooled:
        """What was pooled of batches of so many values a channel, beside which the past has a share of ``past``.

        One value has no variance, and that of a few says little: the running statistics until there are enough.
        """
        single = isinstance(size, Tensor) or size < 2
        if not single or self.running_mean is None or self.running_var is None:
            return pooled
        share, full = torch.as_tensor(pooled.share), torch.as_tensor(1 - past)
        few = ((share > (1.25 * full).clamp_min(1 / ENOUGH)) | (share == 1)) & (size < 2)
        mean, var = torch.where(few, torch.stack([self.running_mean, self.running_var]), torch.stack(pooled[:2]))
        return Pooled(mean, var, pooled.share * (~few).to(mean.dtype))

    def averages(self, history: History, examples: int | Tensor) -> Averages | None:
        """What a backward of so many examples moves, and by how much the loss is scaled; None: nothing."""
        over: Tensor | float | None = self.average_reductions
        if self.average_reductions == 0:
            return None
        if over is None:
            share = self._of_window_examples(examples)
            over = share.clamp_min(1e-9).reciprocal() if isinstance(share, Tensor) else 1 / share
        return Averages(history.reductions, history.backwards, over, self.loss_scale)

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

    @abstractmethod
    def new_history(self, channels: int, groups: int, k: int, like: Tensor) -> History:
        """An empty history, of the dtype and on the device of ``like``; k = 0 where nothing is compensated."""

    def _fresh(self, index: int) -> History:
        """An empty history for a map (-1: none), on the layer's device."""
        own = next(iter((*self.parameters(), *self.buffers())), torch.empty(0))
        like = torch.empty(0, device=own.device, dtype=compute_dtype(own.dtype))
        if index < 0 or not self.compensates:
            return self.new_history(self.num_features, 1, 0, like)
        link = self._links[index]
        geometry = LinearMap.of(link.map)
        assert geometry is not None  # follows() has seen to it
        channels, k = link.rows
        return self.new_history(channels, geometry.groups, k, like)
