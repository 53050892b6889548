"""The usual augmentation of small images: shifted by some pixels, every second one mirrored.

What becomes of an image depends on the seed, the epoch and the image alone: a run that is resumed, or spread over
processes, sees the same.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHIFT", "augmented"]

SHIFT = 4  # pixels, at most, in each direction


def augmented(images: Tensor, indices: Tensor, seed: int, epoch: int, count: int) -> Tensor:
    """Shifts and mirrors images (B, C, H, W); what comes into view is zero.

    Args:
        images: of the indices.
        indices: (B,), of the `count` images there are.
        seed: of the run.
        epoch: the running one, from 0.
        count: of all training images.
    """
    shift, mirror = (t[indices.cpu()].to(images.device) for t in _draws(seed, epoch, count))
    height, width = images.shape[2:]
    padded = F.pad(images, [SHIFT] * 4)
    across = torch.arange(width, device=images.device)
    columns = torch.where(mirror.unsqueeze(1), across.flip(0), across) + shift[:, 1:]
    rows = torch.arange(height, device=images.device) + shift[:, :1]
    examples = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return padded[examples, :, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(3, 1).contiguous()


@lru_cache(maxsize=2)
def _draws(seed: int, epoch: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    shift = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator)
    return shift, torch.rand(count, generator=generator) < 0.5
