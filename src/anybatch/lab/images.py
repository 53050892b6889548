"""A folder of class folders with images, read into tensors and split in two the same way every time."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anybatch.errors import AnybatchError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "UNREADABLE", "load_folder"]

# Of pixels in [0, 1], by channel, as torchvision has them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a damaged file
LAYOUT = "put images into FOLDER/CLASS, or into FOLDER/train/CLASS and FOLDER/test/CLASS"

Files = dict[str, list[Path]]  # class name -> its images


def load_folder(folder: str, image_size: int) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor, Tensor]:
    """Class names, then images (uint8, (N, 3, S, S)) and labels of the train split, then of the test split.

    Without train/ and test/ (or val/) folders, a fifth of the images of every class are test images; which ones depends
    on file names alone. Within a split the classes take turns, so that the first n images are stratified as well.

    Raises:
        AnybatchError: the folder, or an image in it, does not serve.
    """
    if image_size < 8:
        raise AnybatchError(f"image_size is {image_size}: give at least 8 pixels a side")
    train, test = _split(Path(folder).expanduser())
    classes = tuple(sorted(train))
    if len(classes) < 2:
        raise AnybatchError(f"{folder} has one class only, '{classes[0]}': at least two are needed; {LAYOUT}")
    return classes, *_read(train, classes, image_size), *_read(test, classes, image_size)


def _split(root: Path) -> tuple[Files, Files]:
    folders = {entry.name: entry for entry in _entries(root) if entry.is_dir()}
    test_name = next((name for name in ("test", "val") if name in folders), None)
    if "train" in folders and test_name:
        train, test = _classes(folders["train"]), _classes(folders[test_name])
        if odd := sorted(set(train) ^ set(test)):
            there, missing = ("train", test_name) if odd[0] in train else (test_name, "train")
            raise AnybatchError(f"class '{odd[0]}' is in {root / there} and not in {root / missing}: both need it")
        return train, test
    files = _classes(root)
    for name, paths in files.items():
        if len(paths) == 1:
            raise AnybatchError(
                f"class '{name}' of {root} has one image, which cannot be in both splits: add images or drop the class"
            )
    shuffled = {name: sorted(paths, key=_shuffle_key) for name, paths in files.items()}
    return (
        {name: paths[_test_count(paths) :] for name, paths in shuffled.items()},
        {name: paths[: _test_count(paths)] for name, paths in shuffled.items()},
    )


def _shuffle_key(path: Path) -> str:
    return hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()


def _test_count(paths: list[Path]) -> int:
    return max(1, round(len(paths) / 5))


def _classes(root: Path) -> Files:
    found = {entry.name: _images(entry) for entry in _entries(root) if entry.is_dir()}
    if not any(found.values()):
        raise AnybatchError(f"{root} has no class folders with images ({', '.join(sorted(SUFFIXES))}): {LAYOUT}")
    if empty := [name for name, paths in found.items() if not paths]:
        raise AnybatchError(f"class folder {root / empty[0]} has no images: add some, or remove it")
    return found


def _images(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES]


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        mend = f"give an existing folder ({LAYOUT}), or 'embedded', or 'fashion-mnist'"
        raise AnybatchError(f"there is no data folder {folder}: {mend}")
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise AnybatchError(f"{folder} cannot be read ({error.strerror}): allow reading it") from error


def _read(files: Mapping[str, list[Path]], classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    # Classes take turns in proportion: an image's place is its share of the way through its class.
    placed = sorted(
        ((index + 0.5) / len(files[name]), label, path)
        for label, name in enumerate(classes)
        for index, path in enumerate(files[name])
    )
    images = np.stack([_pixels(path, size) for _, _, path in placed])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label, _ in placed])


def _pixels(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except UNREADABLE as error:
        raise AnybatchError(f"image {path} cannot be read ({error}): mend or remove it") from error
