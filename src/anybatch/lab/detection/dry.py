"""A detector for a dry run: nothing is downloaded, and data that are not there are done without."""

from pathlib import Path

import torch
from torch import nn

from anybatch.lab.detection.annotations import Annotations, ImageEntry, Instances
from anybatch.lab.detection.config import DetectConfig
from anybatch.lab.detection.networks import NETWORKS
from anybatch.lab.detection.task import Detect, open_detect
from anybatch.lab.detection.weights import State, body_weights
from anybatch.lab.task import Task

__all__ = ["dry_detect"]


def dry_detect(config: DetectConfig, images: int | None, classes: int | None) -> Task[DetectConfig]:
    """As `open_detect`, with weights at random instead of "imagenet" and "garments".

    Args:
        config: of the run.
        images: images with objects that there would be, where there are no data; None if that is not known.
        classes: likewise.

    Raises:
        AnybatchError: as there; data are needed unless both numbers are given.
    """
    random = config.weights in ("imagenet", "garments")
    weights = (_random(config.network), "") if random else body_weights(config.weights, config.network)
    if config.data == "scenes" or Path(config.data).expanduser().is_dir() or images is None or classes is None:
        task = open_detect(config, weights)
    else:
        stand_in = _stand_in(Path(config.data), classes)
        task = Detect(config, stand_in, stand_in, weights)
        task.stand_in(images)
    if random:
        task.notes += (f"the backbone's weights are random, not '{config.weights}': a dry run downloads none",)
    return task


def _random(network: str) -> State:
    """An untrained body whose norms hold the moments of noise, so that it normalises with them frozen."""
    body = NETWORKS[network].build().train()
    for norm in body.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        body(torch.randn(2, 3, 128, 128))
    return body.state_dict()


class _StandIn(Annotations):
    """Data whose images are not there to be read."""

    fingerprint = ""


def _stand_in(folder: Path, classes: int) -> Annotations:
    """One image with one object."""
    square = [[0.0, 0.0, 1.0, 0.0, 1.0, 1.0]]
    object_ = Instances(
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1]), torch.ones(1), torch.tensor([False]), (square,)
    )
    names, ids = tuple(str(place) for place in range(1, classes + 1)), tuple(range(1, classes + 1))
    return _StandIn(folder, folder, names, ids, (ImageEntry(1, folder, 1, 1),), (object_,), {}, "")
