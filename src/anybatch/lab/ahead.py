"""Examples read in threads, a step ahead of the training that asks for them."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from torch import Tensor

from anybatch.lab import machine

__all__ = ["Ahead"]

T = TypeVar("T")


class Ahead(Generic[T]):
    """Reads training examples by index.

    Args:
        read: an example's index, and how many were trained on before its step, to what is read.
    """

    def __init__(self, read: Callable[[int, int], T]) -> None:
        self._read = read
        # Cores of this machine for each of the processes on it.
        threads = max(2, machine.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.pool = ThreadPoolExecutor(threads, "examples")
        self._coming: dict[tuple[int, int], Future[T]] = {}

    def expect(self, indices: Tensor, seen: int) -> None:
        """Starts reading what is not read yet."""
        for index in indices.tolist():
            if (index, seen) not in self._coming:
                self._coming[index, seen] = self.pool.submit(self._read, index, seen)

    def take(self, indices: Tensor, seen: int) -> list[T]:
        """What was expected, or is read now."""
        self.expect(indices, seen)
        return [self._coming.pop((index, seen)).result() for index in indices.tolist()]
