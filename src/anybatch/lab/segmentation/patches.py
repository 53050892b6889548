"""Patches to train on: cut out of examples at random, padded where an example is smaller."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.lab.segmentation.examples import IGNORE, Example

__all__ = ["cut", "generator_for"]


def generator_for(*facts: int) -> torch.Generator:
    """A generator that depends on these numbers alone, each in its place."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def cut(example: Example, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A normalised patch and its mask, as int64.

    Half of the patches lie anywhere in the example; the others hold a foreground pixel, drawn from all there are, or an
    organ of a few voxels would hardly be seen. Where the example is smaller, zeros are added around it, to be ignored.

    Shape: (C, side, ...), (side, ...).
    """
    shape = example.mask.shape
    room = [max(size - side, 0) for size in shape]
    corner = [_below(most + 1, generator) for most in room]
    if any(room) and _below(2, generator):
        foreground = ((example.mask > 0) & (example.mask != IGNORE)).nonzero()
        if len(foreground):
            pixel = foreground[_below(len(foreground), generator)].tolist()
            corner = [
                min(max(place - _below(side, generator), 0), most) for place, most in zip(pixel, room, strict=True)
            ]
    window = tuple(slice(start, start + side) for start in corner)
    image, mask = example.normalise(example.image[(slice(None), *window)]), example.mask[window].long()
    if any(size < side for size in shape):
        padding: list[int] = []
        for size in reversed(mask.shape):
            padding += [(side - size) // 2, side - size - (side - size) // 2]
        image, mask = F.pad(image, padding), F.pad(mask, padding, value=IGNORE)
    return image, mask


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
