"""What a conversion did to every norm of a model, and why."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Report", "Row"]

Action = Literal["converted", "reverted", "weighed", "left"]


@dataclass(frozen=True)
class Row:
    """One norm.

    Args:
        name: of the norm in the model; the first, where it has several.
        type: its class before.
        shape: (C,), its channels.
        fed_by: names of the maps it follows now.
        action: what was done.
        reason: why it was left alone or follows no map, and what else to know.
        paired: False for a converted norm that should follow a map and does not.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    fed_by: tuple[str, ...] = ()
    action: Action = "converted"
    reason: str = ""
    paired: bool = True


@dataclass(frozen=True)
class Report:
    """One row a norm, in the model's order; ``print`` it.

    Args:
        rows: all norms, those left alone included.
    """

    rows: tuple[Row, ...]

    @property
    def converted(self) -> list[Row]:
        """The norms that were changed (by ``convert_``, ``revert_`` or ``weigh_examples_``), unpaired ones included."""
        return [row for row in self.rows if row.action != "left"]

    @property
    def left(self) -> list[Row]:
        """The norms left alone."""
        return [row for row in self.rows if row.action == "left"]

    @property
    def unpaired(self) -> list[Row]:
        """The converted norms that should follow a map and do not: their history is not compensated."""
        return [row for row in self.converted if not row.paired]

    def __str__(self) -> str:
        head = ("norm", "type", "channels", "fed by", "action", "")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        done = next((row.action for row in self.converted), "converted")
        unpaired = f" ({len(self.unpaired)} without compensation)" if self.unpaired else ""
        summary = f"{len(self.rows)} norms: {len(self.converted)} {done}{unpaired}, {len(self.left)} left alone"
        return "\n".join([*(line.rstrip() for line in table), summary])


def _cells(row: Row) -> tuple[str, ...]:
    channels = "x".join(map(str, row.shape))
    action = row.action if row.paired else "unpaired"
    return row.name, row.type, channels, ", ".join(row.fed_by) or "-", action, row.reason
