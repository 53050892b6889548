"""What a layer of the library refuses to normalise, in words that say the mend."""

import torch
from torch import Tensor

from ..errors import AnybatchError

__all__ = ["check_input"]

# Dimensions of an input for a layer of so many spatial ones; 0: of any.
_RANKS = {
    0: ((2, 3, 4, 5), "(N, C, ...)"),
    1: ((2, 3), "(N, C) or (N, C, L)"),
    2: ((4,), "(N, C, H, W)"),
    3: ((5,), "(N, C, D, H, W)"),
}


def check_input(name: str, y: Tensor, channels: int, dims: int, *own: Tensor | None) -> None:
    """Refuse an input that a layer cannot normalise.

    Args:
        name: the layer's.
        y: the input.
        channels: the layer's.
        dims: spatial dimensions of its inputs; 0 if any will do.
        own: tensors of the layer; the first there is must fit ``y`` in dtype and device.

    Raises:
        AnybatchError: wrong number of dimensions or channels, an integer dtype, or another dtype or device than the
            layer's.
    """
    shape, (ranks, wanted) = tuple(y.shape), _RANKS[dims]
    if y.dim() not in ranks:
        raise AnybatchError(f"{name}: the input has shape {shape}; give it {wanted}")
    if y.shape[1] != channels:
        raise AnybatchError(
            f"{name}: the input has shape {shape}, {y.shape[1]} channels in dim 1, and the layer has "
            f"num_features={channels}; build it with num_features={y.shape[1]} or mend the input"
        )
    if not y.is_floating_point():
        raise AnybatchError(f"{name}: the input is {y.dtype}; convert it to a floating dtype, e.g. x.float()")
    mine = next((t for t in own if t is not None), None)
    if mine is None:
        return
    mixed_precision = y.dtype in (torch.float16, torch.bfloat16) and mine.dtype == torch.float32
    if y.dtype != mine.dtype and not mixed_precision:
        raise AnybatchError(
            f"{name}: the input is {y.dtype} and the layer {mine.dtype}; convert one of them, e.g. model.to(x.dtype)"
        )
    if y.device != mine.device:
        raise AnybatchError(
            f"{name}: the input is on {y.device} and the layer on {mine.device}; move one, e.g. model.to(x.device)"
        )
