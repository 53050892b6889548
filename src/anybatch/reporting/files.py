"""Files that are either wholly there or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Writes `content` to `path`; whoever reads `path`, at any time and after any crash, sees the old or the new file.

    Args:
        path: the file.
        content: all of it.
        keep: what the old file is renamed to, in the same folder. A crash in between can leave no `path`, but `keep`.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old file is as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _sync_folder(folder: Path) -> None:
    """The names in it too are then on the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which has no such call
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
