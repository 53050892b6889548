"""What came of a benchmark, and the file it is kept in."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.bench.config import BenchConfig, Row
from anybatch.lab.bench.traffic import Traffic
from anybatch.lab.summary import label
from anybatch.reporting.files import write_atomically
from anybatch.typed import split_method

__all__ = ["TIMINGS", "Outcome", "Timing", "name_of", "save"]

TIMINGS = "bench.jsonl"
OTHERS = {"released": "CBN, the authors' way", "syncbn": "SyncBatchNorm"}  # beside the table of methods


@dataclass(frozen=True)
class Timing:
    """What came of one row.

    Attributes:
        norm: what its method resolves to.
        seconds: of its steps, a round each; none if it was refused.
        ratios: to the reference's step of the same round.
        traffic: bytes of a step.
        refused: why it was not timed.
        failed: it was refused because its steps were wrong.
    """

    row: Row
    norm: str
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    traffic: Traffic | None = None
    refused: str = ""
    failed: bool = False

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: 25 %, median, 75 %."""
        low, middle, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, middle, high

    @property
    def milliseconds(self) -> float:
        """Median of a step."""
        return 1e3 * median(self.seconds)

    def facts(self) -> dict[str, Any]:
        """As one flat line."""
        facts = asdict(self)
        traffic = facts.pop("traffic") or dict.fromkeys(Traffic.__dataclass_fields__)
        row: dict[str, Any] = facts.pop("row")
        return row | facts | {f"{name}_bytes": value for name, value in traffic.items()}


@dataclass(frozen=True)
class Outcome:
    """A benchmark.

    Attributes:
        repeats: steps that a second in ``timings`` is the mean of.
        bandwidth: bytes a second that this machine copies.
    """

    config: BenchConfig
    timings: tuple[Timing, ...]
    repeats: int
    bandwidth: float

    @property
    def reference(self) -> Timing:
        """BatchNorm, as it is."""
        return self.timings[0]

    def share(self, timing: Timing) -> float | None:
        """Of the copy bandwidth that a row's operators reach, by the bytes they move."""
        if timing.traffic is None or timing.traffic.moved is None:
            return None
        return timing.traffic.moved / (median(timing.seconds) * self.bandwidth)

    def memory(self, timing: Timing) -> float | None:
        """A row's peak memory, in BatchNorm's."""
        if timing.traffic is None or self.reference.traffic is None:
            return None
        mine, its = timing.traffic.peak, self.reference.traffic.peak
        return mine / its if mine is not None and its is not None else None


def name_of(row: Row) -> str:
    """What tables and plots call a row."""
    name = split_method(row.method)[0]
    text = label(row.method).replace(name, OTHERS[name], 1) if name in OTHERS else label(row.method)
    return f"{text}, {row.how}" if row.how else text


def save(folder: Path, outcome: Outcome, command: str) -> Path:
    """Adds to bench.jsonl: a line on the machine and the settings, then one a row.

    Raises:
        AnybatchError: the file cannot be written; what it had is safe.
    """
    head: dict[str, Any] = {
        "machine": machine.machine(outcome.config.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": asdict(outcome.config),
        "repeats": outcome.repeats,
        "copy_bandwidth": outcome.bandwidth,
        "command": command,
    }
    lines = [json.dumps(line) for line in (head, *(timing.facts() for timing in outcome.timings))]
    path = folder / TIMINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise AnybatchError(f"cannot write {path} ({error.strerror or error}): mend it or give --out") from error
    return path
