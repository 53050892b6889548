"""Which images there are: names and classes, without opening one."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.lab.images import SUFFIXES

__all__ = ["Listing", "Split", "list_folder"]

_LAYOUT = "put images into FOLDER/train/CLASS and FOLDER/val/CLASS"


@dataclass(frozen=True)
class Split:
    """The images of one split, sorted by class and name.

    Attributes:
        root: the folder that holds the class folders.
        names: of the files, "CLASS/FILE".
        labels: places in the listing's `classes`, one a name.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.root / self.names[index]


@dataclass(frozen=True)
class Listing:
    """Both splits.

    Attributes:
        classes: names, sorted.
        others: files in class folders that are no images by their names.
        fingerprint: twelve hexadecimal digits that change with the name or the size in bytes of any image. Contents are
            not read: that would take as long as an epoch.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    others: int
    fingerprint: str


def list_folder(folder: str) -> Listing:
    """Lists the images of a folder.

    Raises:
        AnybatchError: train/ or val/ is missing or cannot be read, their classes differ, or a class has no images.
    """
    root, digest = Path(folder).expanduser(), hashlib.sha256()
    if not root.is_dir():
        raise AnybatchError(f"there is no data folder {root}: {_LAYOUT}")
    splits = {name: root / name for name in ("train", "val")}
    for path in splits.values():
        if not path.is_dir():
            raise AnybatchError(f"there is no folder {path}: {_LAYOUT}")
    classes = {name: {e.name for e in _entries(path) if e.is_dir()} for name, path in splits.items()}
    for one, other in (("train", "val"), ("val", "train")):
        if odd := sorted(classes[one] - classes[other]):
            raise AnybatchError(f"class '{odd[0]}' is in {splits[one]} and not in {splits[other]}: both need it")
    names = tuple(sorted(classes["train"]))
    if len(names) < 2:
        raise AnybatchError(f"{splits['train']} has {len(names)} class folders: at least two are needed; {_LAYOUT}")
    (train, train_others), (val, val_others) = (_split(path, names, digest) for path in splits.values())
    return Listing(names, train, val, train_others + val_others, digest.hexdigest()[:12])


def _split(root: Path, classes: tuple[str, ...], digest: "hashlib._Hash") -> tuple[Split, int]:
    """A split, and how many of its files are no images by their names."""
    names: list[str] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        entries = _entries(root / name)
        images = [entry for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES]
        if not images:
            raise AnybatchError(
                f"class folder {root / name} has no images ({', '.join(sorted(SUFFIXES))}): add some, or remove it"
            )
        others += len(entries) - len(images)
        for entry in images:
            try:
                digest.update(f"{root.name}/{name}/{entry.name} {entry.stat().st_size}\n".encode())
            except OSError as error:
                raise AnybatchError(f"image {entry.path} cannot be read ({error.strerror}): put it back") from error
            names.append(f"{name}/{entry.name}")
        labels += [label] * len(images)
    return Split(root, tuple(names), tuple(labels)), others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name; hidden files are none of ours."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise AnybatchError(f"{folder} cannot be read ({error.strerror}): allow reading it") from error
