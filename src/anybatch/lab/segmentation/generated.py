"""The default data: volumes and scenes composed of real Fashion-MNIST garments. No download, and no real patients.

A volume holds one to four solids in textured noise: a garment's image, scaled, is the middle slice of a solid that
thins out towards its ends, as its pixels' brightness allows. Each kind has a brightness of its own, as tissues have in
a CT, times a contrast of the volume's. Contrast, number, place and size differ from volume to volume, and so do the
channel statistics. A scene is the same in two dimensions. Training examples are made of training garments, test
examples of test garments; none hides another, and the mask says their kind.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from anybatch.lab.data import load
from anybatch.lab.segmentation.examples import Example, Examples, Intensity, example, pooled

__all__ = ["GENERATED", "KINDS", "Recipe", "compose", "generated"]

KINDS = ("trouser", "bag", "ankle boot")
EDGE = 0.15  # of full brightness: what is above belongs to the garment
THINNING = 0.45  # by how much more, at either end of a solid

LEVELS = (1.0, 2.0, 3.0)  # brightness of each kind above the noise, as tissues have theirs
SHADING = 0.5  # how far a garment's own pixels shade that
TRIES = 20  # places tried for a garment before the example goes without it

Pixels = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """How examples are made.

    Attributes:
        shape: of an example.
        train: how many there are to train on; likewise `test`.
        garments: fewest and most in one.
        sides: smallest and largest side of a garment's image, in pixels.
        depths: thinnest and thickest solid, in slices.
        contrast: least and most, of garments against the noise.
        noise: standard deviation of the smooth texture, and of the fine noise on it.
    """

    shape: tuple[int, ...]
    train: int
    test: int
    garments: tuple[int, int] = (1, 4)
    sides: tuple[int, int] = (12, 22)
    depths: tuple[int, int] = (8, 14)
    contrast: tuple[float, float] = (0.8, 1.2)
    noise: tuple[float, float] = (0.25, 0.15)


GENERATED = {
    "volumes": Recipe((24, 24, 24), 384, 64, sides=(9, 17), depths=(6, 12)),
    "scenes": Recipe((64, 64), 320, 96, sides=(18, 32)),
}


@cache
def generated(name: str, intensity: Intensity = "data") -> Examples:
    """The examples of that name in `GENERATED`, normalised by the moments of all of them or by their own."""
    recipe, garments = GENERATED[name], load("embedded")
    wanted = [garments.classes.index(kind) for kind in KINDS]

    def split(place: int, count: int, images: Tensor, labels: Tensor) -> list[Example]:
        pictures = [images[labels == label, 0].numpy().astype(np.float32) / 255 for label in wanted]
        # A generator of its own for each: whatever the count, example n is the same.
        return [compose(recipe, pictures, np.random.default_rng([place, number])) for number in range(count)]

    train = split(0, recipe.train, garments.train_images, garments.train_labels)
    test = split(1, recipe.test, garments.test_images, garments.test_labels)
    digest = hashlib.sha256(intensity.encode())
    for each in (*train, *test):
        digest.update(each.image.numpy().tobytes() + each.mask.numpy().tobytes())
    if intensity == "data":
        moments = pooled([each.moments for each in train])
        train, test = ([each._replace(moments=moments) for each in part] for part in (train, test))
    return Examples(name, ("background", *KINDS), train, test, max(recipe.shape), digest.hexdigest()[:12])


def compose(recipe: Recipe, pictures: Sequence[Pixels], rng: np.random.Generator) -> Example:
    """One example.

    Args:
        recipe: to make it by.
        pictures: of each kind of garment, (N, 28, 28), 0 to 1.
        rng: draws everything.
    """
    image, mask = _texture(recipe, rng), np.zeros(recipe.shape, dtype=np.uint8)
    contrast = rng.uniform(*recipe.contrast)
    for _ in range(rng.integers(*recipe.garments, endpoint=True)):
        kind = int(rng.integers(len(pictures)))
        picture = _resized(pictures[kind][rng.integers(len(pictures[kind]))], int(rng.integers(*recipe.sides)))
        edge: float | Pixels = EDGE
        if len(recipe.shape) == 3:
            picture = np.rot90(picture, -1)[..., None]  # along the axes right, anterior, superior
            edge = EDGE + THINNING * np.linspace(-1, 1, int(rng.integers(*recipe.depths)), dtype=np.float32) ** 2
        inside = picture > edge
        if window := _free(mask, inside, rng):
            image[window] += inside * contrast * (LEVELS[kind] + SHADING * (picture - 0.5))
            mask[window][inside] = kind + 1
    return example(torch.from_numpy(image).unsqueeze(0), torch.from_numpy(mask))


def _free(mask: Mask, inside: Mask, rng: np.random.Generator) -> tuple[slice, ...] | None:
    """A place where the garment hides no other; None if none was found."""
    for _ in range(TRIES):
        corner = [
            rng.integers(whole - size, endpoint=True) for whole, size in zip(mask.shape, inside.shape, strict=True)
        ]
        window = tuple(slice(int(start), int(start) + size) for start, size in zip(corner, inside.shape, strict=True))
        if not mask[window][inside].any():
            return window
    return None


def _texture(recipe: Recipe, rng: np.random.Generator) -> Pixels:
    """Smooth noise of a random grain, and fine noise on it."""
    grain = int(rng.integers(4, 8))
    coarse = torch.from_numpy(rng.standard_normal((grain,) * len(recipe.shape), dtype=np.float32))
    mode = "bilinear" if len(recipe.shape) == 2 else "trilinear"
    smooth = F.interpolate(coarse[None, None], recipe.shape, mode=mode)[0, 0].numpy()
    fine = rng.standard_normal(recipe.shape, dtype=np.float32)
    texture: Pixels = recipe.noise[0] * smooth + recipe.noise[1] * fine
    return texture


def _resized(picture: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
