"""What a run tells TensorBoard."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anybatch.integrations._hosts import require

__all__ = ["BOARD", "board"]

BOARD = "tensorboard"  # the folder of events in a run's folder


@contextmanager
def board(folder: Path | None, extra: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function that records values by name, after so many examples; for as long as the context lasts.

    Args:
        folder: of the run; None records nothing.
        extra: of this package that installs TensorBoard.

    Raises:
        AnybatchError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda seen, values: None
        return
    require("tensorboard", extra)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / BOARD) as writer:

        def record(seen: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name.replace(" ", "_"), value, seen)

        yield record
