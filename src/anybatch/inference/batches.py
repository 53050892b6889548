"""Batches of a loader: how a model runs on one, and how many examples it has."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AnybatchError

__all__ = ["examples_in", "run_on"]


def run_on(call: str, model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """``forward(model, batch)``; by default ``model(batch)``, of its first item for a tuple, ``model(**batch)``.

    Raises:
        AnybatchError: the model raises on what it is given by default.
    """
    if forward is not None:
        return forward(model, batch)
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except Exception as error:
        raise AnybatchError(
            f"{call}: the model raised {type(error).__name__}: {error}. If a batch is not what its forward "
            "takes, say how to run it: forward=lambda model, batch: model(...)"
        ) from error


def examples_in(batch: Any) -> int:
    """The length of the first tensor of the batch that has one; 1 for a batch without."""
    return next((len(t) for t in _tensors(batch) if t.dim()), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)
