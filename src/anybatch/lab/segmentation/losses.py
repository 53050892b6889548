"""Soft Dice plus cross-entropy, as MONAI's DiceCELoss, without the pixels that are to be ignored."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.integrations._hosts import require
from anybatch.lab.segmentation.examples import IGNORE

__all__ = ["dice_ce"]


def dice_ce(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the examples, each by itself: gradients of micro-batches add up to those of the whole.

    Shape:
        logits: (N, classes, H, W) or (N, classes, D, H, W). masks: int64, the same without classes.
    """
    kept = masks != IGNORE
    classes = logits.shape[1]
    shares = logits.softmax(1) * kept.unsqueeze(1)
    true = F.one_hot(masks.where(kept, 0), classes).movedim(-1, 1) * kept.unsqueeze(1)
    dice: Tensor = require("monai.losses", "segment").DiceLoss()(shares, true)
    entropies = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none").flatten(1).sum(1)
    return dice + torch.mean(entropies / kept.flatten(1).sum(1).clamp(min=1))
