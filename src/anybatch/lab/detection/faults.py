"""Entries that cannot be used: the first is told in full, all are counted, and they stop the reading or are dropped."""

import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from anybatch.errors import AnybatchError

__all__ = ["MARGIN", "Fault", "Faults", "is_number", "short"]

MARGIN = 1.0  # pixels that a box or polygon may reach out of its image: tools round coordinates differently


class Fault(Exception):
    """One entry is not usable.

    Args:
        kind: what it is counted under.
        detail: what is wrong with this one, with its value.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class Faults:
    """The faults of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._first = ""

    def add(self, entry: str, fault: Fault) -> None:
        """Counts a fault; `entry` says which entry has it."""
        self.counts[fault.kind] += 1
        self._first = self._first or f"{entry}: {fault.detail}"

    def raise_any(self) -> None:
        """Raises AnybatchError if there was a fault."""
        if self.counts:
            raise AnybatchError(
                f"{self.path}: {self._first}. Mend it, or leave all such entries out with --drop-invalid; "
                f"this file has: {self.summary()}"
            )

    def summary(self) -> str:
        """Every kind with its count, the commonest first."""
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())


def is_number(value: Any) -> bool:
    """Whether it is a number that a coordinate or an area can be: finite, below a thousand million, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def short(value: Any) -> str:
    """Its repr, cut to what a message can hold."""
    return reprlib.repr(value)
