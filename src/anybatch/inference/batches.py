"""A loader and its batches: whether it is one, how a model runs on a batch, and how many examples that has."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import AnybatchError

__all__ = ["check_loader", "examples_in", "run_on", "unwrapped"]


def check_loader(call: str, loader: Any) -> None:
    """Refuse what yields no batches; a tensor would yield single examples.

    Raises:
        AnybatchError: naming what it is.
    """
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise AnybatchError(f"{call}: the loader is a {type(loader).__name__}; give something that yields batches")


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: under its wrapper a forward talks to the other ranks, which may have no batch at that time."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model
