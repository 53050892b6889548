"""Examples: an image or volume and its mask; and a data set of them, split in two."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import torch
from torch import Tensor

from anybatch.errors import AnybatchError

__all__ = ["IGNORE", "Example", "Examples", "Files", "Stored", "example"]

IGNORE = 255  # in a mask: neither trained on nor measured
MEMORY = 2 * 1024**3  # bytes that the examples of one split may take; what is beyond is read each time


class Example(NamedTuple):
    """What is to be segmented, and how.

    Attributes:
        image: as read, uint8 or float32; (C, H, W) or (C, D, H, W).
        mask: uint8, of classes or `IGNORE`; the image's shape without C.
        mean: per channel of the whole image, (C,). Likewise `std`, which is 1 where the channel is constant.
    """

    image: Tensor
    mask: Tensor
    mean: Tensor
    std: Tensor

    def normalise(self, image: Tensor) -> Tensor:
        """This image or a part of it -> float32; the whole has zero mean and unit variance per channel."""
        shape = (-1,) + (1,) * (image.dim() - 1)
        return (image.float() - self.mean.view(shape)) / self.std.view(shape)


def example(image: Tensor, mask: Tensor) -> Example:
    """The example with its moments."""
    values = image.flatten(1).double()
    std, mean = torch.std_mean(values, dim=1, correction=0)
    return Example(image, mask, mean.float(), torch.where(std > 0, std, 1).float())


class Files(NamedTuple):
    """Where an example is: one file of its image, or one for each channel; and its mask's."""

    images: tuple[Path, ...]
    mask: Path


class Stored(Sequence[Example]):
    """Examples in files, kept in memory after the first reading as far as `MEMORY` goes.

    Args:
        files: of the examples.
        read: one of them.
    """

    def __init__(self, files: Sequence[Files], read: Callable[[Files], Example]) -> None:
        self._files, self._read = tuple(files), read
        self._kept: dict[int, Example] = {}
        self._left = MEMORY

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "Example | Stored":
        if isinstance(index, slice):
            part = Stored(self._files[index], self._read)
            places = range(len(self._files))[index]
            part._kept = {new: self._kept[old] for new, old in enumerate(places) if old in self._kept}
            part._left = self._left
            return part
        if index not in self._kept:
            read = self._read(self._files[index])
            size = read.image.nbytes + read.mask.nbytes
            if size > self._left:
                return read
            self._kept[index] = read
            self._left -= size
        return self._kept[index]


@dataclass(frozen=True)
class Examples:
    """A data set.

    Attributes:
        name: what the user asked for.
        classes: their names, the background's first.
        patch: pixels or voxels a side to train on, unless the configuration says otherwise.
        fingerprint: hexadecimal digits that change with any example.
    """

    name: str
    classes: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]
    patch: int
    fingerprint: str

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.train[0].image.shape[0]

    @property
    def dims(self) -> int:
        """2 for images, 3 for volumes."""
        return self.train[0].mask.dim()

    def first(self, train: int | None, test: int | None) -> "Examples":
        """The same data with only the first so many examples of each split; None is all.

        Raises:
            AnybatchError: more are asked for than there are.
        """
        for split, asked, there in (("train", train, len(self.train)), ("test", test, len(self.test))):
            if asked is not None and asked > there:
                raise AnybatchError(f"{asked} {split} examples are asked for, '{self.name}' has {there}: give fewer")
        if train is None and test is None:
            return self
        digits = hashlib.sha256(f"{self.fingerprint} {train} {test}".encode()).hexdigest()[:12]
        return replace(self, train=self.train[:train], test=self.test[:test], fingerprint=digits)
