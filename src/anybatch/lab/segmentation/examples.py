"""Examples: an image or volume and its mask; and a data set of them, split in two."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from anybatch.errors import AnybatchError

__all__ = ["IGNORE", "Example", "Examples", "Files", "Intensity", "Moments", "Stored", "example", "pooled"]

Intensity = Literal["example", "data"]

IGNORE = 255  # in a mask: neither trained on nor measured
MEMORY = 2 * 1024**3  # bytes that the examples of one split may take; what is beyond is read each time


class Moments(NamedTuple):
    """Mean and standard deviation per channel, (C,) each, of so many pixels."""

    mean: Tensor
    std: Tensor
    pixels: int


class Example(NamedTuple):
    """What is to be segmented, and how.

    Attributes:
        image: as read, uint8 or float32; (C, H, W) or (C, D, H, W).
        mask: uint8, of classes or `IGNORE`; the image's shape without C.
        moments: that it is normalised by: its own, or those of all training examples.
    """

    image: Tensor
    mask: Tensor
    moments: Moments

    def normalise(self, image: Tensor) -> Tensor:
        """This image or a part of it -> float32, of about zero mean and unit variance; a constant channel is 0."""
        mean, std = (m.view(-1, *[1] * (image.dim() - 1)) for m in (self.moments.mean, self.moments.std))
        return (image.float() - mean) / std.where(std > 0, 1)


def example(image: Tensor, mask: Tensor) -> Example:
    """The example with its own moments."""
    std, mean = torch.std_mean(image.flatten(1).double(), dim=1, correction=0)
    return Example(image, mask, Moments(mean.float(), std.float(), mask.numel()))


def pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of all pixels together: the mean of the variances and the variance of the means."""
    pixels = sum(part.pixels for part in parts)
    share = torch.tensor([part.pixels / pixels for part in parts], dtype=torch.float64).unsqueeze(1)
    means = torch.stack([part.mean for part in parts]).double()
    stds = torch.stack([part.std for part in parts]).double()
    mean = (share * means).sum(0)
    variance = (share * (stds**2 + (means - mean) ** 2)).sum(0)
    return Moments(mean.float(), variance.sqrt().float(), pixels)


class Files(NamedTuple):
    """Where an example is: one file of its image, or one for each channel; and its mask's."""

    images: tuple[Path, ...]
    mask: Path


class _Kept:
    """Examples in memory, with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.examples: dict[Files, Example] = {}
        self.room = room

    def offer(self, files: Files, read: Example) -> None:
        size = read.image.nbytes + read.mask.nbytes
        if size <= self.room:
            self.examples[files] = read
            self.room -= size


class Stored(Sequence[Example]):
    """Examples in files, kept in memory after the first reading as far as `MEMORY` goes.

    Args:
        files: of the examples.
        read: one of them.
        change: made to an example each time it is asked for.
    """

    def __init__(
        self,
        files: Sequence[Files],
        read: Callable[[Files], Example],
        change: Callable[[Example], Example] = lambda example: example,
    ) -> None:
        self._files, self._read, self.change = tuple(files), read, change
        self._kept = _Kept(MEMORY)

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "Example | Stored":
        if isinstance(index, slice):
            part = Stored(self._files[index], self._read, self.change)
            part._kept = self._kept
            return part
        files = self._files[index]
        if files in self._kept.examples:
            return self.change(self._kept.examples[files])
        read = self._read(files)
        self._kept.offer(files, read)
        return self.change(read)


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
            AnybatchError: more are asked for than there are, or those to test on have nothing to find.
        """
        for split, asked, there in (("train", train, len(self.train)), ("test", test, len(self.test))):
            if asked is not None and asked > there:
                raise AnybatchError(f"{asked} {split} examples are asked for, '{self.name}' has {there}: give fewer")
        if train is None and test is None:
            return self
        if test is not None and not any(((e.mask > 0) & (e.mask != IGNORE)).any() for e in self.test[:test]):
            raise AnybatchError(f"the first {test} test examples of '{self.name}' hold background alone: give more")
        digits = hashlib.sha256(f"{self.fingerprint} {train} {test}".encode()).hexdigest()[:12]
        return replace(self, train=self.train[:train], test=self.test[:test], fingerprint=digits)
