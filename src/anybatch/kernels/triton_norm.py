"""The passes as Triton kernels, ReLU included, float32 inside whatever y is.

The kernels and their equations are in :mod:`anybatch.kernels.triton_device`. A value of y is read once in each: 1, 2,
2 and 3 times its size in bytes for moments, normalise, reduce and input_gradient, whether or not a ReLU follows. Sums
over many rows are split into parts, whose number depends on shapes alone: results are the same on every run. Not
measured on a GPU yet: the sizes of tiles and parts are guesses.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.affine import Reductions
from ..core.moments import Moments
from ..core.passes import Affine, Passes, dense, dense_like
from .operators import operator
from .triton_device import input_gradient_tile, join_moments, moments_of_parts, normalise_tile, reduce_parts

__all__ = ["TRITON", "on_device_of"]

_TILE = 2048  # values
_PROGRAMS = 512  # that a reduction is spread over, if there are rows enough


class _Layout(NamedTuple):
    """y (N, C, *) as N * S rows of C channels."""

    rows: int
    channels: int
    positions: int  # S
    by_n: int  # strides
    by_c: int
    by_s: int

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and channels of a program's tile, along the memory."""
        c = min(power_of_2(self.channels), 64) if self.by_c == 1 else 1
        return min(power_of_2(self.rows), _TILE // c), c

    @property
    def blocks(self) -> int:
        """Tiles side by side."""
        return -(-self.channels // self.tile[1])

    @property
    def tiles(self) -> int:
        """The programs of an elementwise pass."""
        return -(-self.rows // self.tile[0]) * self.blocks

    @property
    def parts(self) -> tuple[int, int]:
        """How many parts a reduction has, none of them empty, and the rows of each."""
        tile = self.tile[0]
        tiles = -(-self.rows // tile)
        rows = -(-tiles // max(_PROGRAMS // self.blocks, 1)) * tile
        return -(-self.rows // rows), rows


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def _laid_out(y: Tensor) -> tuple[Tensor, _Layout]:
    y, last = dense(y)
    channels, positions = y.shape[1], y.shape[2:].numel()
    strides = (1, channels) if last else (positions, 1)
    return y, _Layout(y.shape[0] * positions, channels, positions, channels * positions, *strides)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it that of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _two_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[1], dtype=torch.float32), y.new_empty(y.shape[1], dtype=torch.float32)


@operator(_two_rows)
def triton_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each channel of ``y``, float32."""
    y, layout = _laid_out(y)
    (parts, part_rows), (r, c) = layout.parts, layout.tile
    means = y.new_empty(parts * layout.channels, dtype=torch.float32)
    variances = torch.empty_like(means)
    with on_device_of(y):
        moments_of_parts[(parts * layout.blocks,)](y, means, variances, *layout, part_rows, R=r, C=c)
        if parts == 1:
            return means, variances
        mean, var = _two_rows(y)
        sizes = (layout.rows, layout.channels, part_rows, parts)
        join_moments[(-(-layout.channels // 8),)](means, variances, mean, var, *sizes, P=power_of_2(parts), C=8)
    return mean, var


def _like_y(y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(dense(y)[0])


@operator(_like_y)
def triton_normalise(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """[relu](weight * (y - mean) / sqrt(var + eps) + bias) in the dtype of ``y``."""
    y, layout = _laid_out(y)
    out = torch.empty_like(y)
    r, c = layout.tile
    with on_device_of(y):
        normalise_tile[(layout.tiles,)](y, out, mean, var, weight, bias, eps, *layout, RELU=relu, R=r, C=c)
    return out


def _two_sums(g: Tensor, y: Tensor, *_: object) -> Tensor:
    return y.new_empty(2, y.shape[1], dtype=torch.float32)


@operator(_two_sums)
def triton_reduce(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Sum g and sum g * y_hat a channel, (2, C) float32."""
    y, layout = _laid_out(y)
    (parts, part_rows), (r, c) = layout.parts, layout.tile
    sums = y.new_empty(parts, 2, layout.channels, dtype=torch.float32)
    with on_device_of(y):
        reduce_parts[(parts * layout.blocks,)](
            *(dense_like(g, layout.by_c == 1), y, sums, mean, var, weight, bias, eps, *layout, part_rows),
            *(relu, r, c),
        )
    return sums.sum(0) if parts > 1 else sums.view(2, -1)


@operator(lambda g, y, *_: _like_y(y))
def triton_input_gradient(
    g: Tensor,
    y: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: Tensor,
    slope: Tensor,
    offset: Tensor,
    relu: bool,
) -> Tensor:
    """A * g + slope * (y - centre) + offset, a = weight / sqrt(var + eps) or, without a var, one."""
    y, layout = _laid_out(y)
    grad = torch.empty_like(y)
    r, c = layout.tile
    with on_device_of(y):
        input_gradient_tile[(layout.tiles,)](
            *(dense_like(g, layout.by_c == 1), y, grad, mean, var, weight, bias, eps, centre, slope, offset, *layout),
            *(var is not None, relu, r, c),
        )
    return grad


def _moments(y: Tensor) -> Moments:
    return Moments(*triton_moments(y), y.numel() // y.shape[1])


def _normalise(y: Tensor, affine: Affine, relu: bool) -> Tensor:
    return triton_normalise(y, *affine[:5], relu)


def _reduce(g: Tensor, y: Tensor, affine: Affine, relu: bool) -> tuple[Tensor, Reductions]:
    return g, Reductions(*triton_reduce(g, y, *affine[:5], relu).unbind())


def _input_gradient(
    g: Tensor, y: Tensor, affine: Affine | None, centre: Tensor, slope: Tensor, offset: Tensor, relu: bool
) -> Tensor:
    mean, var, weight, bias, eps = (None, None, None, None, 0.0) if affine is None else affine[:5]
    return triton_input_gradient(g, y, mean, var, weight, bias, eps, centre, slope, offset, relu)


TRITON = Passes(_moments, _normalise, _reduce, _input_gradient)
