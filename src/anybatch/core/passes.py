"""The passes over a batch that a normalization is made of, and their reference, made of core's functions.

With y_hat = (y - mean) / sqrt(var + eps), a = weight / sqrt(var + eps) and, where a ReLU is fused, g zero where it is:

    moments          mean, var of y                              reads y
    normalise        [relu](a (y - mean) + bias)                 reads y, writes out
    reduce           sum g, sum g y_hat                          reads g, y
    input_gradient   dy = a g + slope (y - centre) + offset      reads g, y, writes dy

Between the two passes of the backward stand (C,) tensors alone: slope and offset are any function of the sums, and so
every share, window and average of :mod:`anybatch.core.pooled` goes through the same two. Others are in ``kernels``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import affine as core
from .affine import Reductions
from .moments import Moments, moments

__all__ = ["REFERENCE", "Affine", "Passes", "dense", "dense_like", "through_relu"]


class Affine(NamedTuple):
    """What y is normalised by: all (C,), mean and var float32 or better."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    scale: Tensor | None = None  # a, where it is at hand


class Passes(NamedTuple):
    """One implementation of the four passes over y (N, C, *).

    Args:
        moments: (y) -> its moments.
        normalise: (y, affine, relu) -> out.
        reduce: (g, y, affine, relu) -> (what ``input_gradient`` takes for g, the sums).
        input_gradient: (that, y, affine, centre, slope, offset, relu) -> dy. slope and offset are zero where a is;
            affine None stands for a = 1, and then g is g itself.
    """

    moments: Callable[[Tensor], Moments]
    normalise: Callable[[Tensor, Affine, bool], Tensor]
    reduce: Callable[[Tensor, Tensor, Affine, bool], tuple[Tensor, Reductions]]
    input_gradient: Callable[[Tensor, Tensor, Affine | None, Tensor, Tensor, Tensor, bool], Tensor]


def dense(y: Tensor) -> tuple[Tensor, bool]:
    """``y`` without gaps, and whether its channels come last, in any number of dimensions; else they come second."""
    last = y.movedim(1, -1).is_contiguous()
    return y if last else y.contiguous(), last


def dense_like(g: Tensor, channels_last: bool) -> Tensor:
    """``g`` in the order that :func:`dense` said of y."""
    return g.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else g.contiguous()


def through_relu(g: Tensor, y: Tensor, affine: Affine) -> Tensor:
    """``g`` behind the ReLU of the normalised ``y``, which is computed again."""
    through: Tensor = torch.ops.aten.threshold_backward(g, core.normalise(y, *affine[:5]), 0)
    return through


def _normalise(y: Tensor, affine: Affine, relu: bool) -> Tensor:
    out = core.normalise(y, *affine[:5])
    return out.relu_() if relu else out


def _reduce(g: Tensor, y: Tensor, affine: Affine, relu: bool) -> tuple[Tensor, Reductions]:
    g = through_relu(g, y, affine) if relu else g
    return g, core.reduce(g, y, affine.mean, affine.var, affine.eps)


def _input_gradient(
    g: Tensor, y: Tensor, affine: Affine | None, centre: Tensor, slope: Tensor, offset: Tensor, relu: bool
) -> Tensor:
    scale = None if affine is None else affine.scale
    if affine is not None and scale is None:
        scale = core.scale_and_shift(*affine[:5])[0]
    return core.through_moments(g, y, centre, slope, offset, scale)


REFERENCE = Passes(moments, _normalise, _reduce, _input_gradient)
