"""Small folders of images and masks, and of NIfTI volumes, for the tests of segmentation."""

from pathlib import Path

import nibabel
import numpy as np
from PIL import Image


def pair(place: int, shape: tuple[int, ...], classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """An image, float 0 to 1, and a mask with one bright box of each foreground class."""
    rng = np.random.default_rng(place)
    image, mask = rng.random(shape) * 0.3, np.zeros(shape, dtype=np.uint8)
    for value in range(1, classes):
        corner = [int(rng.integers(size - 4)) for size in shape]
        box = tuple(slice(start, start + 4) for start in corner)
        image[box] += value / classes
        mask[box] = value
    return image.clip(0, 1), mask


def save_image(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)


def image_folder(root: Path, count: int = 10, shape: tuple[int, int] = (19, 23), colours: int = 3) -> Path:
    for place in range(count):
        image, mask = pair(place, shape)
        grey = (255 * image).astype(np.uint8)
        pixels = np.stack([grey, grey // 2, 255 - grey], axis=-1) if colours == 3 else grey
        save_image(root / "images" / f"case{place}.png", pixels)
        save_image(root / "masks" / f"case{place}.png", mask)
    return root


def save_volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def volume_folder(
    root: Path, count: int = 5, shape: tuple[int, int, int] = (9, 11, 10), suffix: str = ".nii.gz"
) -> Path:
    for place in range(count):
        image, mask = pair(place, shape)
        save_volume(root / "imagesTr" / f"case{place}{suffix}", (1000 * image).astype(np.float32))
        save_volume(root / "labelsTr" / f"case{place}{suffix}", mask)
    return root
