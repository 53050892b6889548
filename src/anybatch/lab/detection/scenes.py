"""The default data for detection: scenes of real Fashion-MNIST garments, written as a COCO-format folder.

A scene is a smooth texture of its own colours with fine noise, and on it garments at random places, sizes, tints and
brightnesses, under a light of its own. So the channel statistics of one scene say little about the next one's: what
batch 1 makes hard for a norm is in the data. Train scenes are made of training garments, val scenes of test garments.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anybatch.errors import AnybatchError
from anybatch.lab.data import Dataset, load
from anybatch.lab.detection.compose import Placed, SceneConfig, compose
from anybatch.lab.detection.masks import encode
from anybatch.lab.idx import user_cache

__all__ = ["SceneConfig", "scene_folder", "write_scenes"]

TRAIN, VAL = "train", "val"
RECIPE = 1  # raised whenever the same config gives other scenes
MARKER = "scenes.json"  # written into every folder: what it was made with

Entry = dict[str, Any]


def scene_folder(config: SceneConfig) -> Path:
    """The folder in the user's cache where the scenes of this config belong."""
    name = hashlib.sha256(json.dumps(_made_with(config)).encode()).hexdigest()[:12]
    return user_cache() / f"scenes-{name}"


def write_scenes(folder: Path, config: SceneConfig) -> Path:
    """Writes the scenes into `folder`, unless they are there already, and returns it.

    The folder holds train/, val/ (PNG) and annotations/instances_train.json and instances_val.json: boxes tight around
    the garments' visible pixels, their masks and areas, and for each which image of Fashion-MNIST it is ("garment").
    It appears under its name only when it is whole. The same config gives the same pixels, and with the same Pillow the
    same bytes; the first scenes of a larger count are those of a smaller one.

    Raises:
        AnybatchError: the folder holds something else, or cannot be written.
    """
    if _is_whole(folder, config):
        return folder
    garments = load("embedded")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        (beside / "annotations").mkdir()
        _write_split(beside, TRAIN, garments, config)
        _write_split(beside, VAL, garments, config)
        license_text = resources.files("anybatch.lab") / "assets" / "fashion-mnist-LICENSE.txt"
        (beside / "LICENSE.txt").write_bytes(license_text.read_bytes())
        (beside / MARKER).write_text(json.dumps(_made_with(config), indent=1) + "\n", encoding="utf-8")
        beside.chmod(0o755)  # mkdtemp makes folders that only their owner reads
        os.replace(beside, folder)  # fails unless there is no folder, or an empty one
    except OSError as error:
        if _is_whole(folder, config):  # another process was faster
            return folder
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _made_with(config: SceneConfig) -> Entry:
    return {"recipe": RECIPE, **asdict(config)}


def _is_whole(folder: Path, config: SceneConfig) -> bool:
    """Whether the folder holds these scenes; False if it is missing or empty.

    Raises:
        AnybatchError: it holds something else.
    """
    wanted = json.loads(json.dumps(_made_with(config)))
    mend = "give another folder, or delete this one"
    try:
        if not folder.is_dir():
            if folder.exists():
                raise AnybatchError(f"{folder} is a file, no folder for scenes: {mend}")
            return False
        if not any(folder.iterdir()):
            return False
        there = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError as error:
        raise AnybatchError(f"{folder} holds files that are no scenes of anybatch: {mend}") from error
    except (OSError, ValueError) as error:
        raise AnybatchError(f"{folder / MARKER} cannot be read ({error}): {mend}") from error
    known = there if isinstance(there, dict) else {}
    if other := [key for key, value in wanted.items() if known.get(key) != value]:
        was = f"{other[0]} {known.get(other[0])}, asked for is {wanted[other[0]]}"
        raise AnybatchError(f"{folder} holds scenes with {was}: {mend}")
    return True


def _unwritable(folder: Path, error: OSError) -> AnybatchError:
    return AnybatchError(f"scenes cannot be written to {folder} ({error.strerror}): free or allow the space there")


def _write_split(folder: Path, split: str, garments: Dataset, config: SceneConfig) -> None:
    count, images, labels = (
        (config.train, garments.train_images, garments.train_labels)
        if split == TRAIN
        else (config.val, garments.test_images, garments.test_labels)
    )
    pixels, classes = images.squeeze(1).numpy(), labels.tolist()
    (folder / split).mkdir()
    entries: list[Entry] = []
    objects: list[Entry] = []
    for scene in range(1, count + 1):
        # A generator of its own for each scene: whatever the count, scene n is the same.
        picture, placed = compose(pixels, config, np.random.default_rng([config.seed, int(split == VAL), scene]))
        name = f"{scene:06}.png"
        Image.fromarray(picture).save(folder / split / name, compress_level=1)
        entries.append({"id": scene, "file_name": name, "width": config.size, "height": config.size, "license": 1})
        for one in placed:
            objects.append(
                {"id": len(objects) + 1, "image_id": scene, "category_id": classes[one.garment] + 1, **_seen(one)}
            )
    document = {
        "info": {
            "description": f"Scenes composed of Fashion-MNIST's {split} images by anybatch",
            "url": "https://github.com/zalandoresearch/fashion-mnist",
            **_made_with(config),
        },
        "licenses": [
            {
                "id": 1,
                "name": "MIT, Copyright (c) 2017 Zalando SE; see LICENSE.txt",
                "url": "https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE",
            }
        ],
        "categories": [
            {"id": label, "name": name, "supercategory": "garment"} for label, name in enumerate(garments.classes, 1)
        ],
        "images": entries,
        "annotations": objects,
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _seen(placed: Placed) -> Entry:
    """What annotations say of a garment's visible pixels."""
    rows, columns = np.flatnonzero(placed.visible.any(1)), np.flatnonzero(placed.visible.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(placed.visible.sum()),
        "iscrowd": 0,
        "segmentation": encode(placed.visible),
        "garment": placed.garment,
    }
