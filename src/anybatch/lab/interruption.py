"""Ctrl-C and SIGTERM as a wish to stop, which the run fulfils when its step is done."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interruption"]


class Interruption:
    """While the context lasts, the first signal is only noted; Ctrl-C after that ends the process at once.

    Attributes:
        signal: the one that came first; None as long as none came.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Whether there was a signal."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As shells give it: 128 and the signal's number; SIGTERM's where another process had the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
