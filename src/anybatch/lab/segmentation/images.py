"""Folders of images and masks: images/NAME.* and masks/NAME.*, the same names in both."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anybatch.errors import AnybatchError
from anybatch.lab.images import SUFFIXES, UNREADABLE
from anybatch.lab.segmentation.examples import Example, Examples, Files, Intensity, example
from anybatch.lab.segmentation.masks import as_mask
from anybatch.lab.segmentation.splits import entries, ordered, split
from anybatch.lab.segmentation.survey import surveyed

__all__ = ["load_images"]

PATCH = 128
LAYOUT = "put images into FOLDER/images and masks into FOLDER/masks, or both into FOLDER/train and FOLDER/test"
NAMES = "classes.txt"
GREY = {"1", "L", "I", "F", "I;16", "I;16B", "I;16L"}  # Pillow's modes of one channel
LOSSY = {".jpg", ".jpeg", ".webp"}


def load_images(root: Path, image_size: int | None = None, intensity: Intensity | None = None) -> Examples:
    """The examples of a folder.

    With train/ and test/ (or val/) folders, each of them has images/ and masks/; without them a fifth of the examples
    is for testing, by their names. Masks are grey or palette images of class numbers, 0 the background. classes.txt in
    the folder names the classes, one a line, the background first; without it they are those of the training masks.

    Args:
        root: the folder.
        image_size: pixels a side that images and masks are resized to, masks to the nearest pixel.
        intensity: whose moments an image is normalised by; None is "data", those of all training images.

    Raises:
        AnybatchError: the folder, or a file in it, does not serve.
    """
    test_name = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_name:
        train, test = ordered(_cases(root / "train")), ordered(_cases(root / test_name))
    else:
        train, test = split(_cases(root), root)
    read = partial(_read, size=image_size)
    return surveyed(str(root), train, test, read, _names(root), intensity or "data", PATCH)


def _cases(root: Path) -> dict[str, Files]:
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise AnybatchError(f"{root} has no folder {name}: give 'volumes', 'scenes', or a folder: {LAYOUT}")
    images, masks = (_by_stem(root / name) for name in ("images", "masks"))
    if not images:
        raise AnybatchError(f"{root / 'images'} has no images ({', '.join(sorted(SUFFIXES))}): {LAYOUT}")
    for stem in sorted(set(images) ^ set(masks)):
        if stem in images:
            raise AnybatchError(f"image {images[stem]} has no mask in {root / 'masks'}: add {stem}.png, or remove it")
        raise AnybatchError(f"mask {masks[stem]} has no image in {root / 'images'}: add it, or remove the mask")
    return {stem: Files((path,), masks[stem]) for stem, path in images.items()}


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in entries(folder):
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in found:
            raise AnybatchError(f"{found[path.stem]} and {path} have the same name: keep one of them")
        found[path.stem] = path
    return found


def _names(root: Path) -> tuple[str, ...] | None:
    path = root / NAMES
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise AnybatchError(f"{path} cannot be read ({error}): one name a line, the background first") from error
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise AnybatchError(f"{path} has {len(set(names))} names: give 2 to 255 different ones, the background first")
    return names


def _read(files: Files, size: int | None) -> Example:
    image, mask = _open(files.images[0]), _open(files.mask)
    if files.mask.suffix.lower() in LOSSY:
        raise AnybatchError(f"mask {files.mask} is of a kind that changes class numbers: save masks as PNG")
    if mask.mode not in GREY | {"P"}:
        raise AnybatchError(
            f"mask {files.mask} has colours (mode {mask.mode}): save class numbers as a grey or palette image"
        )
    if image.size != mask.size:
        raise AnybatchError(
            f"mask {files.mask} is {mask.size[0]} x {mask.size[1]} pixels, its image {files.images[0]} is "
            f"{image.size[0]} x {image.size[1]}: give them the same size"
        )
    if image.mode not in GREY:
        image = image.convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        mask = mask.resize((size, size), Image.Resampling.NEAREST)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise AnybatchError(f"image {files.images[0]} holds nan or infinity: mend or remove it")
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return example(torch.from_numpy(pixels.copy()), as_mask(np.asarray(mask), files.mask))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except UNREADABLE as error:
        raise AnybatchError(f"{path} cannot be read ({error}): mend or remove it") from error
