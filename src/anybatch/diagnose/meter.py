"""What measurements cost, in passes through the model."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Meter", "Passes"]


@dataclass(frozen=True)
class Passes:
    """Passes of one batch through the model."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __sub__(self, other: "Passes") -> "Passes":
        return Passes(self.forward - other.forward, self.backward - other.backward)

    @property
    def cost(self) -> int:
        """In forward passes: a backward counts for two."""
        return self.forward + 2 * self.backward


class Meter:
    """Counts passes, and tells a listener after every one."""

    def __init__(self) -> None:
        self.passes = Passes()
        self.listener: Callable[[], None] = lambda: None

    def count(self, passes: Passes) -> None:
        """So many more have been made."""
        self.passes = self.passes + passes
        self.listener()
