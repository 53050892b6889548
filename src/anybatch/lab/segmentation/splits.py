"""Which examples are for testing where the data do not say: a fifth, by their names alone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.lab.segmentation.examples import Files

__all__ = ["entries", "ordered", "split"]


def entries(folder: Path) -> list[Path]:
    """Files of a folder by name, hidden ones left out.

    Raises:
        AnybatchError: the folder is not there or cannot be read.
    """
    if not folder.is_dir():
        raise AnybatchError(f"there is no folder {folder}: make it, or give another --data")
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    except OSError as error:
        raise AnybatchError(f"{folder} cannot be read ({error.strerror}): allow reading it") from error


def ordered(cases: Mapping[str, Files]) -> list[Files]:
    """In an order that depends on names alone, and mixes them."""
    return [cases[name] for name in sorted(cases, key=lambda name: hashlib.sha256(name.encode()).hexdigest())]


def split(cases: Mapping[str, Files], root: Path) -> tuple[list[Files], list[Files]]:
    """Train and test.

    Raises:
        AnybatchError: there is but one.
    """
    if len(cases) < 2:
        raise AnybatchError(f"{root} has one example only, which cannot be in both splits: at least 2 are needed")
    files = ordered(cases)
    test = max(1, round(len(files) / 5))
    return files[test:], files[:test]
