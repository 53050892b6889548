"""Activation checkpointing runs a forward twice; the second run must repeat the first bit for bit and push nothing.

A forward that runs inside a backward is such a second run. It is matched to its first by the batch's own moments.
Inside a compiled graph there is none: the compiler repeats what has no effects, and keeps the rest. A checkpoint around
one repeats the effects too, unless the graph asks as it runs: ``first_run``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import AnybatchError

__all__ = ["Replay", "as_they_are", "first_run", "kept", "once"]

_KEPT = 16  # first runs that wait for their second; more at once than the levels of a detection head


@dataclass
class _FirstRun:
    mean: Tensor  # (C,) of the batch
    index: int  # of the map
    pooled: Any
    backwards: int  # that had begun when it ran
    repeated: int = 0


@custom_op("anybatch::first_run", mutates_args=())
def _first_run(ok: Tensor, repeatable: bool) -> Tensor:
    second = Replay.is_second_run()
    if second and not repeatable:
        raise AnybatchError(
            "a checkpoint around a compiled function runs it a second time, and the norm in it has since moved on: "
            "compile the checkpoint with it, as in torch.compile(lambda x: checkpoint(block, x, use_reentrant=False))"
        )
    return ok & (not second)


@_first_run.register_fake
def _(ok: Tensor, repeatable: bool) -> Tensor:
    return torch.empty_like(ok)


def first_run(ok: Tensor, repeatable: bool = True) -> Tensor:
    """``ok``, and inside a compiled graph False as a checkpoint around the graph runs it again.

    Args:
        ok: a bool on the device.
        repeatable: whether a second run that takes nothing in gives what the first gave; else it raises AnybatchError.
    """
    return _first_run(ok, repeatable) if torch.compiler.is_compiling() else ok


def once(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; what it gives is kept where a checkpoint inside a compiled graph would compute it again."""
    if not torch.compiler.is_compiling():
        return function(*args)
    from .compiling import computed_once  # torch's compiler is not imported before it is used

    return computed_once(function, *args)


@custom_op("anybatch::kept", mutates_args=())
def _kept(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@_kept.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(sum(t.numel() for t in tensors))


def kept(*tensors: Any) -> list[Any]:
    """Tensors that a graph's backward takes from its forward; what is none stays as it is.

    A compiler else computes some of them again, from a state that the forward has changed by then; what comes out of
    an operator that is not its own it keeps.
    """
    given = [t for t in tensors if isinstance(t, Tensor)]
    parts = iter(_kept(given).split([t.numel() for t in given]))
    return [next(parts).view(t.shape) if isinstance(t, Tensor) else t for t in tensors]


def as_they_are(*tensors: Tensor) -> Sequence[Tensor]:
    """Copies of what a forward reads and then changes, kept where a checkpoint inside a graph would read it again."""
    return once(_stacked, *tensors).unbind()  # type: ignore[no-any-return]


def _stacked(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)  # a mere copy is none to a compiler


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

    def tidy(self) -> None:
        """Forget what was repeated."""
        self._runs = [run for run in self._runs if not run.repeated]

    def remember(self, mean: Tensor, index: int, pooled: Any) -> None:
        """Keep a first run, if a checkpoint may be what runs it (no gradients, or hooks on what autograd saves)."""
        if torch.compiler.is_compiling():
            return
        self.tidy()
        checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if checkpointed or not torch.is_grad_enabled():
            self._runs.append(_FirstRun(mean, index, pooled, self._backwards))
            del self._runs[:-_KEPT]
        else:  # no checkpoint now, and what ran before the last backward has had its chance
            self._runs = [run for run in self._runs if run.backwards == self._backwards]

    def recall(self, mean: Tensor, index: int, required: bool = True) -> Any:
        """What the latest of the first runs with these moments that were repeated least normalised by.

        It stays until the next first run, since a retained graph runs it once more.

        Raises:
            AnybatchError: there is none, and it is ``required``; else None.
        """
        with _disable_current_modes():  # a selective checkpoint's would look for the comparison in the first run
            runs = [run for run in reversed(self._runs) if run.index == index and _equal(run.mean, mean)]
        if runs:
            run = min(runs, key=lambda run: run.repeated)
            run.repeated += 1
            return run.pooled
        if not required:
            return None
        raise AnybatchError(
            "a checkpointed forward was recomputed on other values than it first ran on, or more than "
            f"{_KEPT} forwards ago: make the checkpointed function deterministic, or checkpoint fewer forwards at once"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, nan included."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
