"""NIfTI volumes as the Medical Segmentation Decathlon and nnU-Net lay them out: imagesTr/ and labelsTr/."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.integrations._hosts import require
from anybatch.lab.segmentation.examples import Example, Examples, Files, Intensity, example
from anybatch.lab.segmentation.masks import as_mask
from anybatch.lab.segmentation.splits import entries, ordered, split
from anybatch.lab.segmentation.survey import surveyed

__all__ = ["is_layout", "load_volumes"]

PATCH = 64
IMAGES, LABELS = "imagesTr", "labelsTr"
TEST_IMAGES, TEST_LABELS = "imagesTs", "labelsTs"
SUFFIXES = (".nii.gz", ".nii")
FACTS = "dataset.json"


def is_layout(root: Path) -> bool:
    """Whether the folder is laid out so."""
    return (root / IMAGES).is_dir() or (root / LABELS).is_dir()


def load_volumes(root: Path, spacing: float | None = None, intensity: Intensity | None = None) -> Examples:
    """The examples of a folder.

    A volume of several channels is one file a channel (NAME_0000.nii.gz, NAME_0001.nii.gz, ...) or, if dataset.json
    names as many modalities, one file of four dimensions. labelsTs/, where it is there, makes imagesTs/ the test
    examples; otherwise a fifth is, by their names. Class names are dataset.json's, if it is there. Volumes are turned
    to the axes right, anterior, superior.

    Args:
        root: the folder.
        spacing: millimetres between voxels to resample to, linearly, masks to the nearest voxel; None leaves the voxels
            as they are, whatever their spacing.
        intensity: whose moments a volume is normalised by; None is "data", those of all training volumes, where
            dataset.json says CT, whose numbers mean the same in all of them, and otherwise "example", its own.

    Raises:
        AnybatchError: the folder, or a file in it, does not serve.
    """
    names, modalities = _facts(root / FACTS)
    cases = _cases(root / IMAGES, root / LABELS)
    if (root / TEST_LABELS).is_dir():
        train, test = ordered(cases), ordered(_cases(root / TEST_IMAGES, root / TEST_LABELS))
    else:
        train, test = split(cases, root)
    read = partial(_read, channels=len(modalities), spacing=spacing)
    by = intensity or ("data" if modalities[0].upper() == "CT" else "example")
    return surveyed(str(root), train, test, read, names, by, PATCH)


def _cases(images: Path, labels: Path) -> dict[str, Files]:
    masks = {_stem(path): path for path in _volumes(labels)}
    files: dict[str, list[Path]] = {}
    for path in _volumes(images):
        stem = _stem(path)
        name = stem if stem in masks else re.sub(r"_\d{4}$", "", stem)
        if name not in masks:
            raise AnybatchError(f"image {path} has no mask in {labels}: add {name}.nii.gz, or remove it")
        files.setdefault(name, []).append(path)
    for name, path in masks.items():
        if name not in files:
            raise AnybatchError(f"mask {path} has no image in {images}: add it, or remove the mask")
    if not files:
        raise AnybatchError(f"{images} has no volumes ({' or '.join(SUFFIXES)}): put them there, masks into {labels}")
    return {name: Files(tuple(paths), masks[name]) for name, paths in files.items()}


def _volumes(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if path.name.lower().endswith(SUFFIXES)]


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _facts(path: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The names of classes and channels in dataset.json; without it None, and one channel without a name."""
    if not path.exists():
        return None, ("",)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        labels, named = facts["labels"], facts.get("modality") or facts.get("channel_names") or {"0": ""}
        modalities = tuple(str(named[key]) for key in sorted(named, key=int))
        # The Decathlon has {"1": "liver"}, nnU-Net {"liver": 1}.
        pairs = labels.items() if "0" in labels else ((value, name) for name, value in labels.items())
        classes = {int(value): str(name) for value, name in pairs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnybatchError(
            f'{path} cannot be read ({type(error).__name__}: {error}): it has "labels", whole numbers by their names '
            f"(regions of several numbers are not supported)"
        ) from error
    if len(classes) < 2 or set(classes) != set(range(len(classes))):
        raise AnybatchError(f"{path} has the labels {sorted(classes)}: give 0 (background), 1, 2, ..., at least two")
    if "ignore" in classes.values():
        raise AnybatchError(f"{path} has the label 'ignore': store what is to be ignored as 255, and drop the label")
    return tuple(classes[value] for value in range(len(classes))), modalities


def _read(files: Files, channels: int, spacing: float | None) -> Example:
    mask, affine, axes = _open(files.mask)
    if mask.ndim != 3:
        raise AnybatchError(f"mask {files.mask} has {mask.ndim} dimensions {mask.shape}: masks have three")
    parts: list[np.ndarray[Any, Any]] = []
    for path in files.images:
        image, _, own_axes = _open(path)
        if image.ndim == 4 and len(files.images) == 1 and image.shape[3] == channels:
            parts += list(np.moveaxis(image, 3, 0))
        elif image.ndim == 3:
            parts.append(image)
        else:
            raise AnybatchError(
                f"image {path} has {image.ndim} dimensions {image.shape}: volumes have three, or four with a "
                f"{FACTS} that names as many modalities"
            )
        if parts[-1].shape != mask.shape:
            raise AnybatchError(
                f"mask {files.mask} is {_size(mask)} voxels, its image {path} is {_size(parts[-1])}: give them the "
                f"same size"
            )
        if own_axes != axes:
            raise AnybatchError(
                f"mask {files.mask} has the axes {axes}, its image {path} has {own_axes}: store both alike"
            )
        if not np.isfinite(parts[-1]).all():
            raise AnybatchError(f"image {path} holds nan or infinity: mend or remove it")
    volume, labels = torch.from_numpy(np.stack(parts)), as_mask(mask, files.mask)
    if spacing is not None:
        volume = _resampled(volume, affine, spacing, "bilinear")
        labels = _resampled(labels.unsqueeze(0).float(), affine, spacing, "nearest")[0].to(torch.uint8)
    return example(volume, labels)


def _size(volume: np.ndarray[Any, Any]) -> str:
    return " x ".join(map(str, volume.shape))


def _open(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]:
    """The volume as float32 along the axes right, anterior, superior; its affine map; the axes that it is stored in."""
    nibabel = require("nibabel", "segment")
    try:
        stored = nibabel.load(path)
        axes = "".join(nibabel.aff2axcodes(stored.affine))
        turned = nibabel.as_closest_canonical(stored)
        return np.asarray(turned.dataobj, dtype=np.float32), turned.affine, axes
    except Exception as error:  # nibabel, gzip and numpy raise whatever they meet
        raise AnybatchError(f"{path} cannot be read ({type(error).__name__}: {error}): mend or remove it") from error


def _resampled(volume: Tensor, affine: np.ndarray[Any, Any], spacing: float, mode: str) -> Tensor:
    data, transforms = require("monai.data", "segment"), require("monai.transforms", "segment")
    resampled = transforms.Spacing((spacing,) * 3, mode=mode)(data.MetaTensor(volume, affine=torch.as_tensor(affine)))
    plain: Tensor = resampled.as_tensor().contiguous()
    return plain
