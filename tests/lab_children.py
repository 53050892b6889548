"""`anybatch train` in processes of their own, which get signals at chosen moments of the run.

A moment is a forward, a step of the optimizer, half of a file written, a file written and not yet synced, a rename.
They are counted, so a moment is the same one in every run, and no clock is asked.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from anybatch.cli import app
from anybatch.reporting import files

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, for all children; torch's own, that the first optimizer and the first group of processes import, too.
_CONTEXT.set_forkserver_preload(
    [__name__, "anybatch.lab.terminal", "torch._dynamo", "torch.distributed.tensor.parallel"]
)


STEP = 4 + 1  # moments of a step with batch 8, or batch 4 on two processes: four forwards, and the optimizer's
EVALUATION = 1  # on fewer test images than it takes at once: a forward
# Three files, each half written, written, renamed, and its folder synced; training.pt's old one is renamed, too.
MOMENTS_OF_A_SAVE = 3 * 4 + 1


class Ended(NamedTuple):
    """What came of a child: exit code (-9: killed), what it printed, and the moments it lived through."""

    code: int
    output: str
    moments: int


def train(*arguments: str, signals: Mapping[int, int] | None = None, limit: int | None = None) -> Ended:
    """One process.

    Args:
        arguments: of `anybatch train`.
        signals: to send to itself, by moment.
        limit: bytes a file may have; a longer one fails as on a full disk.
    """
    return train_together(arguments, [signals or {}], limit)[0]


def train_together(
    arguments: tuple[str, ...], signals: list[Mapping[int, int]], limit: int | None = None
) -> list[Ended]:
    """Processes that train together, one for each of `signals`, as torchrun would start them."""
    outputs, children = [], []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for rank, moments in enumerate(signals):
        theirs, mine = _CONTEXT.Pipe()
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(signals)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "COLUMNS": 200, "NO_COLOR": 1}
        child = _CONTEXT.Process(target=_child, args=(arguments, environment, moments, limit, theirs))
        child.start()
        theirs.close()
        outputs.append(mine)
        children.append(child)
    ended = []
    for child, output in zip(children, outputs, strict=True):
        text = b""
        with contextlib.suppress(EOFError):
            while True:
                text += output.recv_bytes()
        child.join()
        lived = re.search(rb"(\d+) moments\n$", text)
        code = child.exitcode
        assert code is not None
        said = text[: lived.start()] if lived else text
        ended.append(Ended(code, said.decode(), int(lived[1]) if lived else 0))
    return ended


def state(folder: Path, name: str = "training.pt") -> dict[str, Any]:
    """What a training.pt holds, without the seconds it took."""
    saved: dict[str, Any] = torch.load(folder / name, weights_only=True)
    del saved["counters"]["seconds"]
    return saved


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


class Moments:
    """Counts the moments of a run and sends this process the signals that are due."""

    def __init__(self, signals: Mapping[int, int]) -> None:
        self.count, self.signals = 0, signals

    def watch(self) -> None:
        """Count from now on, in this process."""
        F.cross_entropy = self._counted(F.cross_entropy)
        torch.optim.SGD.step = self._counted(torch.optim.SGD.step)
        os.fsync = self._counted(os.fsync)
        os.replace = self._counted(os.replace)
        open_file = os.fdopen
        files.os.fdopen = lambda *arguments: _HalfByHalf(open_file(*arguments), self.passes)

    def passes(self) -> None:
        """One more."""
        self.count += 1
        if self.count in self.signals:
            os.kill(os.getpid(), self.signals[self.count])

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passes()
            return call(*args, **kwargs)

        return counted


class _HalfByHalf:
    """A file written in two halves, with a moment in between."""

    def __init__(self, file: Any, between: Callable[[], None]) -> None:
        self._file, self._between = file, between

    def __enter__(self) -> "_HalfByHalf":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._between()
        self._file.write(content[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _child(
    arguments: tuple[str, ...],
    environment: Mapping[str, object],
    signals: Mapping[int, int],
    limit: int | None,
    pipe: Any,
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = ["anybatch", "train", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    moments = Moments(signals)
    moments.watch()
    sys.stdout = sys.stderr = _Sent(pipe)
    try:
        app()
    finally:
        print(f"{moments.count} moments")


class _Sent:
    """A stream whose text goes through a pipe as it comes."""

    encoding = "utf-8"

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def write(self, text: str) -> int:
        if text:
            self._pipe.send_bytes(text.encode())
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


if __name__ == "__main__":  # by torchrun: rank and moment at which it is killed, then the arguments
    killed, moment = map(int, sys.argv[1:3])
    if int(os.environ["RANK"]) == killed:
        Moments({moment: signal.SIGKILL}).watch()
    sys.argv = ["anybatch", "train", *sys.argv[3:]]
    app()
