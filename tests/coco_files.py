"""Small COCO-format folders for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anybatch.lab.detection.coco import Annotations, read

Document = dict[str, Any]

SIZES = {7: (33, 17), 3: (20, 41), 11: (1, 5)}  # image id -> width, height


def sound() -> Document:
    """Three images of odd shapes, the last without objects; category ids neither dense nor in order."""
    return {
        "images": [{"id": key, "file_name": f"{key}.png", "width": w, "height": h} for key, (w, h) in SIZES.items()],
        "categories": [{"id": 9, "name": "eel"}, {"id": 4, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [
            {"id": 30, "image_id": 3, "category_id": 9, "bbox": [2, 3, 4, 5], "area": 20, "iscrowd": 0,
             "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]},
            {"id": 10, "image_id": 7, "category_id": 4, "bbox": [0.5, 1.25, 30, 10], "area": 150.5, "iscrowd": 0},
            {"id": 20, "image_id": 3, "category_id": 5, "bbox": [0, 0, 20, 41], "area": 3, "iscrowd": 1,
             "segmentation": {"size": [41, 20], "counts": [1, 2, 41, 1, 775]}},
        ],
    }  # fmt: skip


def write(folder: Path, document: Any) -> tuple[Path, Path]:
    """The annotation file and the image folder, written."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for key, (width, height) in SIZES.items():
        pixels = np.random.default_rng(key).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{key}.png")
    path = folder / "instances.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path, images


def read_document(folder: Path, document: Any, drop_invalid: bool = False) -> Annotations:
    return read(*write(folder, document), drop_invalid)
