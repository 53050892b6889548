"""What a segmentation is worth, from counts of pixels: Dice of each example, IoU of all examples together."""

import torch
from torch import Tensor

from anybatch.lab.segmentation.examples import IGNORE

__all__ = ["counts", "dice", "iou"]


def counts(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class were given each class; ignored pixels are not counted.

    Shape: (H, W) or (D, H, W), twice -> (classes, classes): true, predicted.
    """
    kept = mask != IGNORE
    pairs = mask[kept].long() * classes + predicted[kept].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def dice(counted: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) of each foreground class; nan where the true mask has none of it.

    Shape: (..., classes, classes) -> (..., classes - 1).
    """
    true, predicted, both = _sizes(counted)
    return torch.where(true > 0, 2 * both / (true + predicted), torch.nan)


def iou(counted: Tensor) -> Tensor:
    """|A and B| / |A or B| of each foreground class; nan where neither has any of it. Shape as of `dice`."""
    true, predicted, both = _sizes(counted)
    return torch.where(true + predicted > 0, both / (true + predicted - both), torch.nan)


def _sizes(counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counted = counted.double()
    both = counted.diagonal(dim1=-2, dim2=-1)
    return counted.sum(-1)[..., 1:], counted.sum(-2)[..., 1:], both[..., 1:]
