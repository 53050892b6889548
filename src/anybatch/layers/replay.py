"""Activation checkpointing runs a forward twice; the second run must repeat the first bit for bit and push nothing.

A forward that runs inside a backward is such a second run. It is matched to the first by the batch's own moments.
"""

from collections import deque

import torch
from torch import Tensor

from ..core.pooled import Pooled
from ..errors import AnybatchError

__all__ = ["Replay"]

_KEPT = 16  # first runs that wait for their second; more at once than the levels of a detection head


class Replay:
    """What the last first runs normalised by. Not copied with the model."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Pooled]] = deque(maxlen=_KEPT)
        self._used: list[tuple[Tensor, Pooled]] = []

    @staticmethod
    def is_second_run() -> bool:
        """Whether this forward runs inside a backward."""
        return torch._C._current_graph_task_id() != -1

    def remember(self, mean: Tensor, pooled: Pooled) -> None:
        """Keep a first run, if a checkpoint may be what runs it (no gradients, or hooks on what autograd saves)."""
        self._used.clear()
        if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            self._waiting.append((mean, pooled))

    def recall(self, mean: Tensor) -> Pooled:
        """The first run with these moments.

        Raises:
            AnybatchError: there is none.
        """
        kept = [*self._waiting, *self._used]
        for entry in kept:
            if torch.equal(entry[0], mean):
                if any(entry is waiting for waiting in self._waiting):
                    self._waiting = deque((e for e in self._waiting if e is not entry), maxlen=_KEPT)
                    self._used.append(entry)
                return entry[1]
        raise AnybatchError(
            "a checkpointed forward was recomputed on other values than it first ran on, or more than "
            f"{_KEPT} forwards ago: make the checkpointed function deterministic, or checkpoint fewer forwards at once"
        )
