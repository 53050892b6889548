"""The default data: volumes and scenes composed of real Fashion-MNIST garments. No download, and no real patients.

A volume holds one to five solids in textured noise: a garment's image, scaled, is the middle slice of a solid that
thins out towards its ends, as brightness allows. How bright the solids are against the noise, how many they are and
how large, differs from volume to volume, so that the channel statistics of one say little about the next one's. A scene
is the same in two dimensions. Training examples are made of training garments, test examples of test garments; the
mask says the kind of garment, and later ones hide earlier ones.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from anybatch.lab.data import Dataset, load
from anybatch.lab.segmentation.examples import Example, Examples, example

__all__ = ["GENERATED", "Recipe", "compose", "generated"]

KINDS = ("T-shirt", "trouser", "bag", "ankle boot")
EDGE = 0.15  # of full brightness: what is above belongs to the garment
THINNING = 0.45  # by how much more, at either end of a solid

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """How examples are made.

    Attributes:
        shape: of an example.
        train: how many there are to train on; likewise `test`.
        most: garments in one; the fewest is 1.
        sides: smallest and largest side of a garment's image, in pixels.
        depths: thinnest and thickest solid, in slices.
        contrast: least and most, of garments against the noise.
        noise: standard deviation of the smooth texture, and of the fine noise on it.
    """

    shape: tuple[int, ...]
    train: int
    test: int
    most: int = 5
    sides: tuple[int, int] = (12, 22)
    depths: tuple[int, int] = (8, 14)
    contrast: tuple[float, float] = (0.5, 1.5)
    noise: tuple[float, float] = (0.25, 0.15)


GENERATED = {
    "volumes": Recipe((32, 32, 32), 160, 48),
    "scenes": Recipe((64, 64), 320, 96, sides=(18, 32)),
}


@cache
def generated(name: str) -> Examples:
    """The examples of that name in `GENERATED`."""
    recipe, garments = GENERATED[name], load("embedded")
    splits = []
    for split, count in enumerate((recipe.train, recipe.test)):
        pictures = _pictures(garments, train=split == 0)
        # A generator of its own for each: whatever the count, example n is the same.
        splits.append([compose(recipe, pictures, np.random.default_rng([split, number])) for number in range(count)])
    digest = hashlib.sha256()
    for each in (*splits[0], *splits[1]):
        digest.update(each.image.numpy().tobytes() + each.mask.numpy().tobytes())
    classes = ("background", *KINDS)
    return Examples(name, classes, *splits, max(recipe.shape), digest.hexdigest()[:12])


def _pictures(garments: Dataset, train: bool) -> list[Pixels]:
    images, labels = (
        (garments.train_images, garments.train_labels) if train else (garments.test_images, garments.test_labels)
    )
    wanted = [garments.classes.index(kind) for kind in KINDS]
    return [images[labels == label, 0].numpy().astype(np.float32) / 255 for label in wanted]


def compose(recipe: Recipe, pictures: list[Pixels], rng: np.random.Generator) -> Example:
    """One example.

    Args:
        recipe: to make it by.
        pictures: of each kind of garment, (N, 28, 28), 0 to 1.
        rng: draws everything.
    """
    image, mask = _texture(recipe, rng), np.zeros(recipe.shape, dtype=np.uint8)
    contrast = rng.uniform(*recipe.contrast)
    for _ in range(rng.integers(1, recipe.most, endpoint=True)):
        kind = int(rng.integers(len(pictures)))
        picture = _resized(pictures[kind][rng.integers(len(pictures[kind]))], int(rng.integers(*recipe.sides)))
        if len(recipe.shape) == 3:
            ends = np.linspace(-1, 1, int(rng.integers(*recipe.depths)), dtype=np.float32)
            picture = np.rot90(picture, -1)[..., None]  # along the axes right, anterior, superior
            inside = picture > EDGE + THINNING * ends**2
        else:
            inside = picture > EDGE
        corner = [
            int(rng.integers(whole - size, endpoint=True)) for whole, size in zip(mask.shape, inside.shape, strict=True)
        ]
        window = tuple(slice(start, start + size) for start, size in zip(corner, inside.shape, strict=True))
        image[window] += np.where(inside, contrast * (0.5 + picture) - image[window] / 2, 0)
        mask[window] = np.where(inside, kind + 1, mask[window])
    return example(torch.from_numpy(image).unsqueeze(0), torch.from_numpy(mask))


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
