"""What the patches and covariances of many layers say of their weights, all at once.

    for every layer and row c of its weight W (C, K):    ( <P_g(c), W_c>, <D_c, W_c> )

They depend on weights and history alone, so they can be had between two steps, and on a GPU in one launch.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.moments import compute_dtype
from ..errors import AnybatchError
from .choose import responses_by_triton

__all__ = ["responses_of_all"]


def responses_of_all(
    weights: Sequence[Tensor], covariances: Sequence[Tensor], patches: Sequence[Tensor]
) -> list[Tensor]:
    """``(<P_g(c), W_c>, <D_c, W_c>)`` for every row of every layer, without bias: (C, 2) each, float32 or better.

    Args:
        weights: W (C, K) of each layer, its rows as :func:`anybatch.core.linear_map.rows` gives them.
        covariances: D = E[(y - mean) p] (C, K), in any floating dtype.
        patches: P = E[p] (G, K), likewise; C / G rows that follow one another share one.

    Raises:
        AnybatchError: the shapes of a layer do not fit one another.
    """
    if not len(weights) == len(covariances) == len(patches):
        counts = f"{len(weights)} weights, {len(covariances)} covariances and {len(patches)} patches"
        raise AnybatchError(f"responses_of_all got {counts}: give one of each a layer.")
    results: list[Tensor] = [torch.empty(0)] * len(weights)
    together = defaultdict(list)
    for i, layer in enumerate(zip(weights, covariances, patches, strict=True)):
        w, d, p = layer
        if (
            w.dim() != 2
            or d.shape != w.shape
            or p.dim() != 2
            or p.shape[1] != w.shape[1]
            or not len(p)
            or len(w) % len(p)
        ):
            shapes = f"W {tuple(w.shape)}, D {tuple(d.shape)}, P {tuple(p.shape)}"
            raise AnybatchError(
                f"responses_of_all: layer {i} has {shapes}; give (C, K), (C, K), (G, K), G a part of C."
            )
        if responses_by_triton(*layer):
            together[w.device, w.dtype, d.dtype, p.dtype].append(i)
        else:
            results[i] = _responses(*layer)
    for of in together.values():
        from .triton_responses import triton_responses

        chosen = [[tensors[i].detach() for i in of] for tensors in (weights, covariances, patches)]
        pairs = torch.split(triton_responses(*chosen), [len(w) for w in chosen[0]])
        for i, pair in zip(of, pairs, strict=True):
            results[i] = pair
    return results


def _responses(weight: Tensor, covariance: Tensor, patch: Tensor) -> Tensor:
    """The reference: one layer, one product after the other."""
    dtype = compute_dtype(weight.dtype)
    weight, covariance, patch = (t.detach().to(dtype) for t in (weight, covariance, patch))
    by_group = weight.reshape(len(patch), -1, weight.shape[1])
    by_patch = torch.linalg.vecdot(by_group, patch.unsqueeze(1)).flatten()
    return torch.stack([by_patch, torch.linalg.vecdot(weight, covariance)], 1)
