"""One scene: garments drawn on a texture."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from anybatch.errors import AnybatchError

__all__ = ["GARMENT", "Placed", "SceneConfig", "compose"]

GARMENT = 28  # pixels a side of a Fashion-MNIST image
INK = 16  # of 255: what is brighter belongs to the garment; the images' ground is 0
SMALLEST = 0.5  # the scale at which every garment still covers more than a dozen pixels
TRIES = 30  # places tried for a garment before the scene goes without it
NOISE = 0.04  # of the full range: how far fine noise goes, either way

Bytes = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]  # y1, x1, y2, x2


@dataclass(frozen=True)
class SceneConfig:
    """What scenes to make.

    Attributes:
        train: number of scenes to train on; likewise `val`, to evaluate on.
        size: pixels a side of a scene.
        objects: fewest and most garments a scene; a full scene may hold fewer, never none.
        scale: smallest and largest size of a garment's image, in units of its 28 pixels; 0.5 is the least.
        overlap: the largest share of a garment's pixels that later garments may hide, and of the smaller of two
            garments' boxes that may lie in the other.
        seed: of everything random.
    """

    train: int = 600
    val: int = 200
    size: int = 96
    objects: tuple[int, int] = (1, 6)
    scale: tuple[float, float] = (0.6, 1.6)
    overlap: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises AnybatchError for what no scenes can be made of."""
        (fewest, most), (smallest, largest) = self.objects, self.scale
        for value, holds, mend in (
            (f"train={self.train}, val={self.val}", self.train >= 1 and self.val >= 1, "at least 1 of either"),
            (f"size={self.size}", self.size >= GARMENT, f"at least {GARMENT} pixels"),
            (f"objects={self.objects}", 1 <= fewest <= most, "fewest and most, from 1 up"),
            (
                f"scale={self.scale}",
                SMALLEST <= smallest <= largest <= self.size / GARMENT,
                f"smallest and largest, from {SMALLEST} to {self.size / GARMENT:.2f} (the whole scene)",
            ),
            (f"overlap={self.overlap}", 0 <= self.overlap <= 0.5, "a share from 0 to 0.5"),
            (f"seed={self.seed}", self.seed >= 0, "a whole number from 0 up"),
        ):
            if not holds:
                raise AnybatchError(f"scenes: {value} cannot be: give {mend}")


@dataclass
class Placed:
    """A garment in a scene: which one, its box, its pixels when it was drawn, and those still visible."""

    garment: int
    box: Box
    pixels: int
    visible: Mask


def compose(garments: Bytes, config: SceneConfig, rng: np.random.Generator) -> tuple[Bytes, list[Placed]]:
    """A scene and the garments in it, the hindmost first.

    Shape:
        garments: (N, 28, 28). Scene: (size, size, 3).
    """
    scene = _ground(config.size, rng)
    ground = scene.mean((0, 1))
    placed: list[Placed] = []
    for _ in range(rng.integers(*config.objects, endpoint=True)):
        garment = int(rng.integers(len(garments)))
        shade, cover = _resized(garments[garment], round(GARMENT * rng.uniform(*config.scale)))
        # Of two tints the one further from the ground's mean, so that few garments are the colour of what they lie on.
        tint = max(rng.uniform(0.1, 1, (2, 3)), key=lambda colour: float(np.abs(colour - ground).sum()))
        if spot := _spot(cover, placed, config, rng):
            box, drawn = spot
            inside = scene[box[0] : box[2], box[1] : box[3]]
            inside += cover[..., None] * (shade[..., None] * tint - inside)
            for other in placed:
                other.visible &= ~drawn
            placed.append(Placed(garment, box, int(drawn.sum()), drawn))
    light = rng.uniform(0.5, 1, 3) * rng.uniform(0.6, 1.2)
    noise = rng.uniform(-NOISE, NOISE, scene.shape)
    return np.clip((scene * light + noise) * 255, 0, 255).round().astype(np.uint8), placed


def _spot(
    cover: Pixels, placed: list[Placed], config: SceneConfig, rng: np.random.Generator
) -> tuple[Box, Mask] | None:
    """A box that hides little enough of the others, and the pixels drawn there; None if none was found."""
    height, width = cover.shape
    for _ in range(TRIES):
        y, x = (int(rng.integers(config.size - length, endpoint=True)) for length in (height, width))
        box = (y, x, y + height, x + width)
        drawn = np.zeros((config.size, config.size), dtype=bool)
        drawn[y : y + height, x : x + width] = cover >= 0.5
        if all(
            _shared(box, other.box) <= config.overlap
            and (other.visible & ~drawn).sum() >= (1 - config.overlap) * other.pixels
            for other in placed
        ):
            return box, drawn
    return None


def _ground(size: int, rng: np.random.Generator) -> Pixels:
    """Two colours that run into each other in a smooth texture. Shape: (size, size, 3), 0 to 1."""
    cells = int(rng.integers(2, 7))
    coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    share = np.clip(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)[..., None]
    one, other = rng.random((2, 3))
    mixed: Pixels = share * one + (1 - share) * other
    return mixed


def _resized(garment: Bytes, side: int) -> tuple[Pixels, Pixels]:
    """Its brightness and its cover, 0 to 1, cut to the pixels where the cover is half or more."""
    ink = (garment > INK).astype(np.float32)
    shade, cover = (
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR))
        for plane in (garment.astype(np.float32) / 255, ink)
    )
    rows, columns = np.flatnonzero((cover >= 0.5).any(1)), np.flatnonzero((cover >= 0.5).any(0))
    tight = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    # A black garment is not to vanish: the darkest shade is a quarter of the tint.
    return 0.25 + 0.75 * shade[tight], cover[tight]


def _shared(one: Box, other: Box) -> float:
    """The intersection of two boxes as a share of the smaller one."""
    height, width = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    if height <= 0 or width <= 0:
        return 0.0
    return height * width / min((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
