"""Reads every file once before anything is trained: what is wrong with one is said then, by its name."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from anybatch.errors import AnybatchError
from anybatch.lab.segmentation.examples import IGNORE, Example, Examples, Files, Intensity, Moments, Stored, pooled

__all__ = ["surveyed"]

Values = dict[Path, set[int]]  # of each mask


def surveyed(
    name: str,
    train: Sequence[Files],
    test: Sequence[Files],
    read: Callable[[Files], Example],
    names: tuple[str, ...] | None,
    intensity: Intensity,
    patch: int,
) -> Examples:
    """The data set of these files.

    The value 255 of a mask is ignored, unless no mask has another value than 0 and 255: then it is class 1.

    Args:
        name: what the user asked for.
        train: files to train on.
        test: files to measure on.
        read: an example of its files; the mask holds the file's values.
        names: of the classes, the background's first; None: found in the masks.
        intensity: whose moments each is normalised by.
        patch: the data's own.

    Raises:
        AnybatchError: a file is unusable, or they do not make a data set together.
    """
    digest = hashlib.sha256()
    values: Values = {}
    moments: list[list[Moments]] = [[], []]
    splits = [Stored(files, read) for files in (train, test)]
    channels: tuple[Path, int] | None = None
    for part, files, stored in zip(moments, (train, test), splits, strict=True):
        for each, example in zip(files, stored, strict=True):
            own = each.images[0], example.image.shape[0]
            channels = channels or own
            if own[1] != channels[1]:
                raise AnybatchError(
                    f"{own[0]} has {_channels(own[1])}, {channels[0]} has {channels[1]}: give all images the same"
                )
            for tensor in (example.image, example.mask):
                digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
            present = torch.bincount(example.mask.flatten(), minlength=256).nonzero()
            values[each.mask] = set(present.flatten().tolist())
            part.append(example.moments)
    seen = set[int]().union(*values.values())
    black_and_white = seen <= {0, IGNORE} and IGNORE in seen
    if black_and_white:
        values = {path: {min(value, 1) for value in found} for path, found in values.items()}
        names = names or ("background", "foreground")
    classes = names or _found(values, [files.mask for files in train])
    _check(values, classes, [files.mask for files in train], [files.mask for files in test])
    shared = pooled(moments[0]) if intensity == "data" else None

    def change(example: Example) -> Example:
        mask = example.mask.clamp(max=1) if black_and_white else example.mask
        return Example(example.image, mask, shared or example.moments)

    for stored in splits:
        stored.change = change
    digest.update(repr((classes, shared)).encode())
    return Examples(name, classes, splits[0], splits[1], patch, digest.hexdigest()[:12])


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count != 1)}"


def _found(values: Values, train: Sequence[Path]) -> tuple[str, ...]:
    """Names for the classes up to the largest value of the training masks, all of which must occur."""
    seen = set[int]().union(*(values[path] for path in train)) - {0, IGNORE}
    for value in range(1, max(seen, default=0)):
        if value not in seen:
            beyond = next(path for path in train if any(value < v < IGNORE for v in values[path]))
            other = min(v for v in values[beyond] if v > value)
            raise AnybatchError(
                f"mask {beyond} has the value {other}, no training mask has {value}: masks hold classes 0, 1, 2, ... "
                f"(0 is the background); where one of them does not occur, name all in classes.txt or dataset.json"
            )
    return ("background", *(f"class {value}" for value in range(1, max(seen, default=1) + 1)))


def _check(values: Values, classes: tuple[str, ...], train: Sequence[Path], test: Sequence[Path]) -> None:
    for path, found in values.items():
        if beyond := [value for value in sorted(found) if len(classes) <= value < IGNORE]:
            raise AnybatchError(
                f"mask {path} has the value {beyond[0]}, the {len(classes)} classes are 0 to {len(classes) - 1} "
                f"({', '.join(classes)}): mend the mask, or name the class"
            )
    for split, paths in (("training", train), ("test", test)):
        if not any(values[path] - {0, IGNORE} for path in paths):
            raise AnybatchError(
                f"no {split} mask has any foreground, {paths[0]} and the {len(paths) - 1} others hold 0 or 255 alone: "
                f"masks hold 1, 2, ... where something is to be found"
            )
