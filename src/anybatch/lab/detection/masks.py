"""COCO's segmentations, polygons and run-length encodings, checked and decoded by faster-coco-eval."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.integrations._hosts import require
from anybatch.lab.detection.faults import MARGIN, Fault, is_number, short

__all__ = ["check_segmentation", "encode", "to_pixels"]


def encode(mask: "np.ndarray[Any, Any]") -> dict[str, Any]:
    """The run-length encoding of a mask, ready for JSON. Shape: (H, W), zero or not."""
    encoded = _coco().encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def to_pixels(segmentation: Any, height: int, width: int) -> Tensor:
    """A sound segmentation as pixels. Shape: uint8, (height, width), 0 or 1."""
    coco = _coco()
    return torch.from_numpy(np.ascontiguousarray(coco.decode(coco.segmToRle(segmentation, width, height))))


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raises Fault unless the segmentation is one of an image of this size, with at least one pixel."""
    if isinstance(segmentation, dict):
        _check_encoding(segmentation, height, width)
    elif isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
        coco = _coco()
        if not coco.area(coco.segmToRle(segmentation, width, height)):
            raise Fault("mask without pixels", "its polygons cover no pixel")
    else:
        raise Fault("malformed mask", f"its segmentation is {short(segmentation)}, neither polygons nor an encoding")


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    # Before the rasteriser sees it: a coordinate that is nan or far away costs it memory without bound.
    if not isinstance(polygon, list) or not all(map(is_number, polygon)) or len(polygon) % 2:
        raise Fault("malformed mask", f"its polygon {short(polygon)} is not a list of numbers x, y, x, y, ...")
    if len(polygon) < 6:
        raise Fault("mask without pixels", f"its polygon {short(polygon)} has fewer than 3 points")
    xs, ys = polygon[0::2], polygon[1::2]
    if min(xs) < -MARGIN or min(ys) < -MARGIN or max(xs) > width + MARGIN or max(ys) > height + MARGIN:
        raise Fault(
            "mask outside the image",
            f"its polygon spans x {min(xs)} to {max(xs)} and y {min(ys)} to {max(ys)}, the image is {width} x {height}",
        )


def _check_encoding(segmentation: dict[str, Any], height: int, width: int) -> None:
    if segmentation.get("size") != [height, width]:
        raise Fault(
            "malformed mask",
            f"its encoding has size {short(segmentation.get('size'))}, the image has [height, width] {[height, width]}",
        )
    try:
        pixels = to_pixels(segmentation, height, width)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:  # the decoder's, for counts that are none
        raise Fault("malformed mask", f"its counts {short(segmentation.get('counts'))} cannot be decoded") from error
    if not pixels.any():
        raise Fault("mask without pixels", "its encoding has no pixel set")


def _coco() -> Any:
    return require("faster_coco_eval.core.mask", "detect")
