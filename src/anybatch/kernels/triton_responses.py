"""The responses of many layers in one launch.

    for every layer l and row c of its weight W (C, K):    out = ( <P_g(c), W_c>, <D_c, W_c> )

A program takes a row. Which layer that is of, and where its tensors lie, stands in two tables that are made once for a
set of tensors: addresses and sizes of the layers, and the layer of every row. Reads each weight and covariance once and
a patch once a row of its group (from the cache): 8 bytes a weight in float32, 6 with the covariances in half precision;
writes 8 bytes a row. Not measured on a GPU yet.
"""

from functools import lru_cache
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from .operators import operator
from .triton_device import row_responses
from .triton_norm import on_device_of, power_of_2

__all__ = ["triton_responses"]

_FIELDS = 9
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(maxsize=8)  # tables of the sets of tensors in use: one a model, or one before and one after a reload
def _tables(layers: tuple[tuple[int, ...], ...], rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    first = accumulate(rows, initial=0)
    table = [(*layer[:3], begin, *layer[3:]) for layer, begin in zip(layers, first, strict=False)]
    of_rows = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(rows))
    return torch.tensor(table, dtype=torch.int64).to(device), of_rows.to(device)


def _a_pair_a_row(weights: list[Tensor], *_: object) -> Tensor:
    return weights[0].new_empty(sum(len(w) for w in weights), 2, dtype=torch.float32)


@operator(_a_pair_a_row)
def triton_responses(weights: list[Tensor], covariances: list[Tensor], patches: list[Tensor]) -> Tensor:
    """``(<P_g(c), W_c>, <D_c, W_c>)`` of the rows of all layers below one another, float32.

    Args:
        weights: (C, K) each, all of one device and one dtype, whose rows are contiguous.
        covariances: (C, K) each, likewise.
        patches: (G, K) each, likewise.
    """
    layers = tuple(
        (w.data_ptr(), d.data_ptr(), p.data_ptr(), w.shape[1], len(w) // len(p), w.stride(0), d.stride(0), p.stride(0))
        for w, d, p in zip(weights, covariances, patches, strict=True)
    )
    table, layer_of_row = _tables(layers, tuple(len(w) for w in weights), weights[0].device)
    out = _a_pair_a_row(weights)
    kinds = [_DTYPES[of[0].dtype] for of in (weights, covariances, patches)]
    size = min(power_of_2(max(w.shape[1] for w in weights)), 1024)
    with on_device_of(out):
        row_responses[(len(out),)](out, table, layer_of_row, _FIELDS, *kinds, size)
    return out
