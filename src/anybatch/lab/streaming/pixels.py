"""An image file as what a network sees of it: a random part in training, the middle in evaluation."""

import math
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.lab.images import UNREADABLE

__all__ = ["middle_pixels", "random_part", "training_pixels"]

AREA = (0.08, 1.0)  # of the part, as a share of the image's; drawn evenly
RATIO = (3 / 4, 4 / 3)  # of its width to its height; the logarithm is drawn evenly
MIDDLE = 224 / 256  # of the shorter side, a side: scaled to 256, then cut to 224
TRIES = 10

Box = tuple[float, float, float, float]


def training_pixels(path: Path, size: int, random: Random) -> Tensor:
    """A random part, mirrored half the time (Szegedy et al. 2015). Shape: uint8, (3, size, size).

    Raises:
        AnybatchError: the file cannot be read.
    """
    image = _opened(path)
    part = _scaled(image, size, random_part(image.width, image.height, random))
    return _tensor(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part)


def middle_pixels(path: Path, size: int) -> Tensor:
    """The middle square, 224/256 of the shorter side. Shape: uint8, (3, size, size).

    Raises:
        AnybatchError: the file cannot be read.
    """
    image = _opened(path)
    side = MIDDLE * min(image.width, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _tensor(_scaled(image, size, (left, top, left + side, top + side)))


def random_part(width: int, height: int, random: Random) -> Box:
    """Left, top, right and bottom of a part of an image, in whole pixels."""
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    # An image too long or too narrow: the largest part in its middle that is neither.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _opened(path: Path) -> Image.Image:
    """Its pixels in RGB; EXIF orientation is not applied, as is usual for ImageNet."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise AnybatchError(
            f"image {path} cannot be read ({error}): put a whole one there; without it, start anew"
        ) from error


def _scaled(image: Image.Image, size: int, box: Box) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
