"""Activation checkpointing runs a forward twice; the second run must repeat the first bit for bit and push nothing.

A forward that runs inside a backward is such a second run. It is matched to its first by the batch's own moments.
Inside a compiled graph there is none: the compiler repeats what has no effects, and keeps the rest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AnybatchError

__all__ = ["Replay"]

_KEPT = 16  # first runs that wait for their second; more at once than the levels of a detection head


@dataclass
class _FirstRun:
    mean: Tensor  # (C,) of the batch
    index: int  # of the map
    pooled: Any
    backwards: int  # that had begun when it ran
    repeated: bool = False


class Replay:
    """First runs of one norm that a checkpoint may run again, and what each normalised by. No copy takes it along."""

    def __init__(self) -> None:
        self._runs: list[_FirstRun] = []
        self._backwards = 0

    @staticmethod
    def is_second_run() -> bool:
        """Whether this forward runs inside a backward."""
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def backward_begins(self) -> None:
        """Note a backward through the norm."""
        self._backwards += 1

    def remember(self, mean: Tensor, index: int, pooled: Any) -> None:
        """Keep a first run, if a checkpoint may be what runs it (no gradients, or hooks on what autograd saves)."""
        if torch.compiler.is_compiling():
            return
        self._runs = [run for run in self._runs if not run.repeated]
        checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if checkpointed or not torch.is_grad_enabled():
            self._runs.append(_FirstRun(mean, index, pooled, self._backwards))
            del self._runs[:-_KEPT]
        else:  # no checkpoint now, and what ran before the last backward has had its chance
            self._runs = [run for run in self._runs if run.backwards == self._backwards]

    def recall(self, mean: Tensor, index: int) -> Any:
        """What the latest first run with these moments normalised by.

        It stays until the next first run, since a retained graph runs it once more.

        Raises:
            AnybatchError: there is none.
        """
        for run in reversed(self._runs):
            if run.index == index and torch.equal(run.mean, mean):
                run.repeated = True
                return run.pooled
        raise AnybatchError(
            "a checkpointed forward was recomputed on other values than it first ran on, or more than "
            f"{_KEPT} forwards ago: make the checkpointed function deterministic, or checkpoint fewer forwards at once"
        )
