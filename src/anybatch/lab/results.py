"""The folder of a comparison: finished runs, one JSON line each, that no crash, kill or full disk takes away."""

import contextlib
import errno
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anybatch.errors import AnybatchError
from anybatch.lab.tasks import config_of
from anybatch.lab.training import RunResult
from anybatch.reporting.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows: two comparisons in one folder are then the user's care
    fcntl = None  # type: ignore[assignment]

__all__ = ["RUNS", "Results", "parse"]

RUNS = "runs.jsonl"


class Results:
    """Finished runs by key, as they lie in `folder`; one process at a time holds a folder.

    Opening reads what is there. A line that is damaged moves to runs.jsonl.corrupt and is named in `warnings`; its run
    counts as not done.

    Raises:
        AnybatchError: the folder cannot be made, read or written, or another comparison is writing to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, RunResult] = {}
        self.warnings: list[str] = []
        self._lines: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a")
        except OSError as error:
            raise self._cannot("write to", error) from error
        try:
            self._take_lock()
            self._read()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.close()

    def add(self, result: RunResult) -> None:
        """Adds a finished run; on return it is on the disk.

        Raises:
            AnybatchError: it cannot be written; all runs added before are safe.
        """
        line = json.dumps(result.record(), allow_nan=False)
        self._write(RUNS, [*self._lines, line])
        self._lines.append(line)
        self.runs[result.key] = result

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AnybatchError(
                f"another comparison is writing to {self.folder}: wait for it, or name another folder with --out"
            ) from error

    def _read(self) -> None:
        corrupt = []
        for number, line in enumerate(self._old_lines(RUNS), 1):
            try:
                result = parse(line)
            except (ValueError, KeyError, TypeError) as error:
                corrupt.append(line)
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                self.warnings.append(
                    f"line {number} of {self.folder / RUNS} is damaged ({reason}): "
                    f"moved to {RUNS}.corrupt, its run is done again"
                )
                continue
            self.runs[result.key] = result
            self._lines.append(line)
        if corrupt:
            # In this order: a crash in between leaves the line in both files, not in neither.
            self._write(f"{RUNS}.corrupt", [*self._old_lines(f"{RUNS}.corrupt"), *corrupt])
            self._write(RUNS, self._lines)

    def _old_lines(self, name: str) -> list[str]:
        path = self.folder / name
        try:
            # Bytes that are no UTF-8 survive the round trip into the .corrupt file.
            text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
        except OSError as error:
            raise self._cannot("read", error) from error
        return [line for line in text.split("\n") if line.strip()]

    def _write(self, name: str, lines: Iterable[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape")
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            raise self._cannot("write to", error) from error

    def _cannot(self, do: str, error: OSError) -> AnybatchError:
        safe = f"{len(self._lines)} finished run{'s are' if len(self._lines) != 1 else ' is'} safe there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return AnybatchError(
                f"the disk of {self.folder} is full; {safe}: make room, then give the same command to go on"
            )
        reason = error.strerror or str(error)
        return AnybatchError(f"cannot {do} the results folder {self.folder} ({reason}); {safe}: mend it or give --out")


def parse(line: str) -> RunResult:
    """The run of a line.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    record: dict[str, Any] = json.loads(line)
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    names = [name for name in RunResult.__dataclass_fields__ if name not in ("config", "more", "facts")]
    known = {name: record.pop(name) for name in names}
    config, more = config_of(record.pop("config")), record.pop("more", {})
    result = RunResult(config=config, more=more, facts=record, **known)
    if result.status not in ("finished", "diverged") or not isinstance(result.key, str):
        raise ValueError("no status or key")
    with contextlib.suppress(TypeError):
        if math.isfinite(result.seconds) and (result.status == "diverged" or 0 <= (result.accuracy or 0) <= 100):
            return result
    raise ValueError("values out of range")
