"""COCO's measures of detections, by faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.integrations._hosts import require
from anybatch.lab.detection.annotations import Annotations
from anybatch.lab.detection.masks import encode

__all__ = ["Detection", "detection", "score"]

Detection = dict[str, Any]
_STATS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR1", "AR10", "AR100")


def detection(image_id: int, output: dict[str, Tensor], category_ids: Sequence[int]) -> list[Detection]:
    """What a detector found in one image, in COCO's form.

    Args:
        image_id: of the image.
        output: boxes (n, 4) as x1, y1, x2, y2; labels (n,), 1-based; scores (n,); masks (n, 1, H, W) in [0, 1] if any.
        category_ids: COCO's, of the labels.
    """
    boxes = output["boxes"].cpu().double()
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    found = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": value}
        for label, box, value in zip(labels, sides, scores, strict=True)
    ]
    if "masks" in output:
        for each, mask in zip(found, output["masks"][:, 0].cpu() > 0.5, strict=True):
            each["segmentation"] = encode(mask.numpy())
    return found


def score(truth: Annotations, found: Sequence[Detection], masks: bool) -> dict[str, float]:
    """COCO's box measures in percent by name, and those of the masks as "mask AP", ...; -1 of COCO is left out.

    Nothing found is 0.
    """
    core = require("faster_coco_eval", "detect")
    reference = core.COCO(truth.as_coco(), print_function=_quiet)
    measures: dict[str, float] = {}
    for kind, prefix in (("bbox", ""), ("segm", "mask ")) if masks else (("bbox", ""),):
        if not found:
            measures |= {prefix + name: 0.0 for name in _STATS[:3]}
            continue
        # A mask is small or large by its own area: beside a box COCO's code would take the box's.
        without = {"bbox"} if kind == "segm" else set()
        results = [{key: value for key, value in each.items() if key not in without} for each in found]
        evaluator = core.COCOeval_faster(reference, reference.loadRes(results), kind, print_function=_quiet)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        stats = zip(_STATS, evaluator.stats[: len(_STATS)], strict=True)
        measures |= {prefix + name: round(100 * float(value), 4) for name, value in stats if value >= 0}
    return measures


def _quiet(*lines: object) -> None:
    """Its printing goes nowhere."""
