"""What a file holds as a mask: class numbers, in bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anybatch.errors import AnybatchError

__all__ = ["as_mask"]


def as_mask(values: npt.NDArray[Any], path: Path) -> Tensor:
    """The values as uint8.

    Raises:
        AnybatchError: they are not all whole numbers from 0 to 255; the message names `path`.
    """
    bad = ~((values >= 0) & (values <= 255) & (values == np.floor(values))) if values.dtype != np.bool_ else values < 0
    if bad.any():
        raise AnybatchError(
            f"mask {path} has the value {values[bad][0]:g}: masks hold class numbers, 0 to 254, and 255 for what is "
            f"to be ignored"
        )
    return torch.from_numpy(values.astype(np.uint8))
