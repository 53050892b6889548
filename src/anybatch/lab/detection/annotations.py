"""What a COCO-format data set holds, once it is known to be sound."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.lab.detection.masks import to_pixels

__all__ = ["MANY", "Annotations", "ImageEntry", "Instances"]

MANY = 10_000  # images


@dataclass(frozen=True)
class ImageEntry:
    """One image: its id in the file, where it lies, and its width and height in pixels as stored."""

    id: int
    file: Path
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one image, in the order of the file; n may be 0.

    Attributes:
        boxes: float32, (n, 4): x1, y1, x2, y2 in pixels, inside the image, each with an area above 0.
        labels: int64, (n,): 1-based positions in the data set's `categories`; 0 is left for the background.
        areas: float32, (n,), in pixels.
        crowd: bool, (n,): whether it marks a group, which evaluation ignores.
        segmentations: per object COCO's polygons or run-length encoding, undecoded; None where there is none.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor
    segmentations: tuple[Any, ...]

    def __len__(self) -> int:
        """The number of objects."""
        return len(self.labels)

    def masks(self, height: int, width: int) -> Tensor:
        """The segmentations as pixels, of the image's `height` and `width`. Shape: uint8, (n, height, width), 0 or 1.

        Raises:
            AnybatchError: an object has no segmentation.
        """
        if None in self.segmentations:
            place = self.segmentations.index(None) + 1
            raise AnybatchError(
                f"object {place} of {len(self)} has a box and no segmentation: add one, or train a model without masks"
            )
        masks = [to_pixels(segmentation, height, width) for segmentation in self.segmentations]
        return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Annotations:
    """A COCO-format data set in which every entry has been checked.

    Attributes:
        path: the annotation file.
        folder: where its images lie.
        categories: names in the order of their ids; a name that several ids share has its id behind it.
        category_ids: COCO's ids of `categories`, ascending.
        images: in the order of the file, those without objects included.
        instances: the objects of each of `images`.
        dropped: how many entries were left out, by reason; empty unless that was asked for.
        digest: SHA-256 of the annotation file, hexadecimal.
    """

    path: Path
    folder: Path
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageEntry, ...]
    instances: tuple[Instances, ...]
    dropped: Mapping[str, int]
    digest: str

    @property
    def has_masks(self) -> bool:
        """Whether every object has a segmentation."""
        return all(None not in instances.segmentations for instances in self.instances)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, that changes with any byte of the annotation file or of an image.

        It reads every image file once, when first asked for. Beyond `MANY` images their names and sizes stand for them:
        reading all of COCO in every process before it starts would take minutes. Dates differ from copy to copy.
        """
        digest = hashlib.sha256(self.digest.encode())
        for image in self.images:
            try:
                if len(self.images) > MANY:
                    digest.update(f"{image.file.name} {image.file.stat().st_size}".encode())
                else:
                    digest.update(hashlib.sha256(image.file.read_bytes()).digest())
            except OSError as error:
                raise AnybatchError(f"image {image.file} cannot be read ({error.strerror}): put it back") from error
        return digest.hexdigest()

    def as_coco(self) -> dict[str, Any]:
        """The checked data in COCO's own form: what an evaluator takes as ground truth.

        Objects are numbered anew from 1, since COCO's evaluation takes the id 0 for "no match".
        """
        objects: list[dict[str, Any]] = []
        for image, instances in zip(self.images, self.instances, strict=True):
            for place, (x1, y1, x2, y2) in enumerate(instances.boxes.double().tolist()):
                entry = {
                    "id": len(objects) + 1,
                    "image_id": image.id,
                    "category_id": self.category_ids[int(instances.labels[place]) - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(instances.areas[place]),
                    "iscrowd": int(instances.crowd[place]),
                }
                if (segmentation := instances.segmentations[place]) is not None:
                    entry["segmentation"] = segmentation
                objects.append(entry)
        images = [
            {"id": i.id, "file_name": os.path.relpath(i.file, self.folder), "width": i.width, "height": i.height}
            for i in self.images
        ]
        names = zip(self.category_ids, self.categories, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in names]
        return {"images": images, "annotations": objects, "categories": categories}
