"""Bytes: held at the peak of a step, kept as history, moved by operators; and how fast this machine copies."""

import math
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anybatch.lab.bench.config import COMPILED, GRAPHS
from anybatch.lab.bench.subjects import Subject
from anybatch.lab.released import ReleasedCBN
from anybatch.training import history_state_dict

__all__ = ["Meter", "Traffic", "copy_bandwidth", "measure", "wait"]

COPIED = 2**28  # bytes: well beyond any cache
WRITE_ONLY = {"copy_", "zero_", "fill_"}  # these do not read what they write to


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step.

    Attributes:
        weights: of the parameters.
        history: of the training state that layers keep.
        peak: at most alive at once in a step: weights, running statistics, history, gradients and activations; on a CPU
            without what operators hold for themselves, and not known where those are compiled. None: not known.
        moved: that operators read and wrote, in the mean of the steps that were measured, every one its inputs once and
            its outputs once, views for nothing; as if there were no cache between operators. None: not known, as
            operators are compiled.
    """

    weights: int
    history: int
    peak: int | None
    moved: int | None


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is on, the bytes that operators move, and those of the tensors alive.

    Args:
        held: tensors alive before; others are noticed when an operator reads them.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = self.alive = self.peak = 0
        self._storages: dict[int, weakref.finalize[Any, Any]] = {}
        for tensor in held:
            self._notice(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and counts."""
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in (*inputs, *outputs):
            self._notice(tensor)
        schema = func._schema
        name = schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not is_view and "empty" not in name:
            distinct = {id(t): t for t in (inputs[1:] if name in WRITE_ONLY else inputs)}
            written = [t for t in inputs if name in WRITE_ONLY][:1] or outputs
            self.moved += sum(map(_bytes, (*distinct.values(), *written)))
        return out

    def _notice(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) not in self._storages:
            size = storage.nbytes()
            self._storages[key] = weakref.finalize(storage, self._forget, key, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _forget(self, key: int, size: int) -> None:
        del self._storages[key]
        self.alive -= size

    def close(self) -> None:
        """Stop watching."""
        for watch in self._storages.values():
            watch.detach()


def _bytes(t: Tensor) -> int:
    """Of its distinct elements: an expanded dimension has one."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)


def measure(steps: Subject, several: int = 1) -> Traffic:
    """Of the next steps, which are the slower for it."""
    model = steps.model
    released = [t for m in model.modules() if isinstance(m, ReleasedCBN) for t in m.history()]
    history = sum(map(_bytes, (*_tensors(history_state_dict(model)), *released)))
    weights = sum(map(_bytes, model.parameters()))
    steps.clear()
    opaque = COMPILED in steps.how or GRAPHS in steps.how
    peak = moved = None
    if steps.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(several):
            steps()
        held = weights + history + sum(map(_bytes, model.buffers()))
        # A graph's memory is set aside when it is captured.
        peak = None if GRAPHS in steps.how else held + torch.cuda.max_memory_allocated() - before
        steps.clear()
    if not opaque:
        meter = Meter([*model.parameters(), *model.buffers(), *released])
        del released
        try:
            with meter:
                for _ in range(several):
                    steps()
        finally:
            meter.close()
        moved, peak = meter.moved // several, meter.peak if peak is None else peak
    return Traffic(weights, history, peak, moved)


def _tensors(state: Any) -> list[Tensor]:
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return [state] if isinstance(state, Tensor) else [t for value in values for t in _tensors(value)]


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of a large tensor reads and writes: the median of 5."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * COPIED / median(seconds[1:])


def wait(device: str) -> None:
    """Until the device has done all it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
