"""What Cross-Iteration BatchNorm needs of the linear map y = W p + b that feeds it, in closed form.

    d mean_c / dW_c = E[p]                       the mean input patch, one for all channels of a group
    d var_c  / dW_c = 2 E[(y_c - mean_c) p]      one weight-gradient of the map

with p the input patch of an output position (K = C_in / groups * kernel values) and E over examples and positions.
The same for convolutions in 1, 2 and 3 dimensions, transposed or not, grouped, depthwise, strided, dilated, with any
padding mode, and for Linear. Letters: N examples, C output channels, G groups, K values of a patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moments import compute_dtype

__all__ = ["CONVOLUTIONS", "MAPS", "TRANSPOSED", "LinearMap"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAPS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class LinearMap:
    """The geometry of a convolution, a transposed convolution or a Linear (then ``kernel`` is empty).

    Args:
        groups: G.
        kernel: kernel size of each spatial dimension.
        stride: of each dimension.
        dilation: of each dimension.
        pads: (before, after) of each dimension.
        padding_mode: 'zeros', 'circular', 'reflect' or 'replicate'.
        transposed: whether the weight is (C_in, C / G, *kernel) and the map a transposed convolution.
    """

    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "LinearMap | None":
        """The geometry of ``module``, or None where it is no linear map that torch knows."""
        if isinstance(module, nn.Linear):
            return cls()
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            return None
        read = _geometry if torch.compiler.is_compiling() else _cached_geometry
        facts = module.groups, tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
        return read(*facts, _padding_of(module), module.padding_mode, isinstance(module, TRANSPOSED))

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as one row an output channel, (C, K); differentiable, so a gradient keeps its own layout."""
        if not self.transposed:
            return weight.flatten(1)
        per_group = weight.view(self.groups, -1, *weight.shape[1:]).transpose(1, 2)  # (G, C/G, C_in/G, *kernel)
        return per_group.flatten(0, 1).flatten(1)

    def plain_rows(self, weight: Tensor) -> Tensor:
        """The weight itself where flattening gives its rows, else these: a gradient of its shape is added in place."""
        return self.rows(weight) if self.transposed else weight

    def rows_shape(self, weight: Tensor) -> tuple[int, int]:
        """(C, K), read from the shape of the weight alone."""
        first, *rest = weight.shape
        if not self.transposed:
            return first, math.prod(rest)
        return rest[0] * self.groups, first // self.groups * math.prod(rest[1:])

    def mean_patch(self, x: Tensor, output_size: tuple[int, ...]) -> Tensor:
        """E[p], (G, K): the mean over examples and output positions of the input patch.

        The patch is linear in x, so x is first summed over examples; then each spatial dimension is contracted with a
        small matrix that counts how often each kernel tap reads each input position.

        Args:
            x: the map's input, (N, C_in, *); (*, K) for Linear.
            output_size: spatial size of the map's output; () for Linear.
        """
        x = x.to(compute_dtype(x.dtype))
        if not self.kernel:
            return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
        total = x.sum(0)
        for d in reversed(range(len(output_size))):  # the last axis each time, which then moves to the front
            taps = self._taps(d, x.shape[2 + d], output_size[d], total)
            total = torch.matmul(total, taps.t()).movedim(-1, 1)
        return total.reshape(self.groups, -1) / (x.shape[0] * math.prod(output_size))

    def covariance(self, x: Tensor, y_centred: Tensor, weight: Tensor) -> Tensor:
        """E[z p], (C, K): the weight-gradient of the map under the cotangent z / m.

        Args:
            x: the map's input.
            y_centred: z = y - mean, its output less the channel means, (N, C, *).
            weight: of the map; only its shape is read.
        """
        dtype = compute_dtype(x.dtype)
        x, y_centred = x.to(dtype), y_centred.to(dtype)
        m = y_centred.numel() // y_centred.shape[1]
        if not self.kernel:
            return y_centred.reshape(-1, y_centred.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) / m
        padding = [before for before, _ in self.pads]
        if not self.transposed and (self.padding_mode != "zeros" or any(a != b for a, b in self.pads)):
            x = self._pad(x)
            padding = [0] * len(self.kernel)
        _, grad, _ = torch.ops.aten.convolution_backward(
            y_centred,
            x,
            weight.detach().to(dtype),
            None,
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            self._output_padding(x, y_centred),
            self.groups,
            [False, True, False],
        )
        return self.rows(grad) / m

    def reading(
        self, input_size: tuple[int, ...], output_size: tuple[int, ...], at: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Where in the map's input the patches of S output positions lie, for :meth:`patches`.

        Args:
            input_size: spatial size of the map's input; () for Linear.
            output_size: of its output.
            at: the positions' examples (S,), then their coordinates, one (S,) a spatial dimension.

        Returns:
            Indices of examples and of each spatial dimension, which broadcast to (S, *kernel), and where in
            (S, *kernel, 1) there is nothing but zeros, if anywhere.
        """
        dims = len(self.kernel)
        index, outside = [at[0].view(-1, *[1] * dims)], None
        for d in range(dims):
            reads = self._reads(d, input_size[d], output_size[d], at[0].device)[at[1 + d]]
            reads = reads.view(len(reads), *(self.kernel[d] if i == d else 1 for i in range(dims)))
            if self.transposed or (self.padding_mode == "zeros" and self.pads[d] != (0, 0)):
                outside = reads < 0 if outside is None else outside | (reads < 0)
                reads = reads.clamp_min(0)
            index.append(reads)
        return index, None if outside is None else outside.unsqueeze(-1)

    def patches(self, x: Tensor, index: Sequence[Tensor], outside: Tensor | None) -> Tensor:
        """Input patches (S, G, K), in float32 or better, of the map's input x, from where :meth:`reading` says."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])[index[0]].to(compute_dtype(x.dtype)).unsqueeze(1)
        found: Tensor = torch.ops.aten.index(x, [index[0], None, *index[1:]])  # (S, *kernel, C_in)
        if outside is not None:
            found = found.masked_fill_(outside, 0.0)
        return found.to(compute_dtype(x.dtype)).movedim(-1, 1).reshape(len(found), self.groups, -1)

    def _output_padding(self, x: Tensor, y: Tensor) -> list[int]:
        # From the sizes, since a call may give another output_size than the module's.
        if not self.transposed:
            return [0] * len(self.kernel)
        least = [
            (size - 1) * stride - 2 * before + dilation * (kernel - 1) + 1
            for size, stride, (before, _), dilation, kernel in zip(
                x.shape[2:], self.stride, self.pads, self.dilation, self.kernel, strict=True
            )
        ]
        return [have - want for have, want in zip(y.shape[2:], least, strict=True)]

    def _pad(self, x: Tensor) -> Tensor:
        flat = [p for pair in reversed(self.pads) for p in pair]
        return F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _taps(self, d: int, input_size: int, output_size: int, like: Tensor) -> Tensor:
        count = _tap_counts if torch.compiler.is_compiling() else _cached_tap_counts
        return count(*self._along(d), input_size, output_size, like.dtype, like.device)

    def _reads(self, d: int, input_size: int, output_size: int, device: torch.device) -> Tensor:
        find = _tap_reads if torch.compiler.is_compiling() else _cached_tap_reads
        return find(*self._along(d), input_size, output_size, device)

    def _along(self, d: int) -> tuple[int, int, int, tuple[int, int], str, bool]:
        return self.kernel[d], self.stride[d], self.dilation[d], self.pads[d], self.padding_mode, self.transposed


def _padding_of(module: Any) -> tuple[int, ...]:
    """(last dimension before, after, ..., first dimension before, after), as the forward of a convolution reads it.

    Zeros are padded by ``padding`` as it is now: models are dilated after they are built. Other modes go by what the
    constructor noted.
    """
    kernel, padding = module.kernel_size, module.padding
    if module.padding_mode != "zeros" or padding == "valid":
        return tuple(module._reversed_padding_repeated_twice)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)]
        return tuple(side for span in reversed(spans) for side in (span // 2, span - span // 2))
    each = padding if isinstance(padding, tuple) else (padding,) * len(kernel)
    return tuple(side for pad in reversed(each) for side in (pad, pad))


def _geometry(
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    transposed: bool,
) -> LinearMap:
    """``padding`` is (last dimension before, after, ..., first dimension before, after)."""
    pads = tuple((padding[2 * i], padding[2 * i + 1]) for i in reversed(range(len(kernel))))
    return LinearMap(groups, tuple(kernel), tuple(stride), tuple(dilation), pads, padding_mode, transposed)


def _tap_reads(
    kernel: int,
    stride: int,
    dilation: int,
    pads: tuple[int, int],
    padding_mode: str,
    transposed: bool,
    input_size: int,
    output_size: int,
    device: torch.device | None = None,
) -> Tensor:
    """(output_size, kernel): the input position that each output position reads through each tap, -1 for none."""
    tap, output = torch.arange(kernel) * dilation, torch.arange(output_size).unsqueeze(1)
    if transposed:
        # Input i reaches output i * stride - pad + tap.
        reach = output + pads[0] - tap
        source = reach.div(stride, rounding_mode="floor")
        inside = (reach.remainder(stride) == 0) & (source >= 0) & (source < input_size)
        return torch.where(inside, source, -1).to(device)
    positions = torch.arange(input_size, dtype=torch.float64)[None, None] + 1  # 0 is left for zero padding
    positions = F.pad(positions, pads, mode="constant" if padding_mode == "zeros" else padding_mode)[0, 0].long()
    return (positions[output * stride + tap] - 1).to(device)


def _tap_counts(
    kernel: int,
    stride: int,
    dilation: int,
    pads: tuple[int, int],
    padding_mode: str,
    transposed: bool,
    input_size: int,
    output_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(kernel, input_size): how many output positions read input position i through tap k, along one dimension."""
    reads = _tap_reads(kernel, stride, dilation, pads, padding_mode, transposed, input_size, output_size).t()
    counts = torch.zeros(kernel, input_size + 1, dtype=dtype)
    return counts.scatter_add_(1, reads + 1, torch.ones((), dtype=dtype).expand_as(reads))[:, 1:].to(device)


_cached_geometry = lru_cache(maxsize=1024)(_geometry)
# What is cached must serve training too.
_cached_tap_reads = lru_cache(maxsize=1024)(torch.inference_mode(False)(_tap_reads))
_cached_tap_counts = lru_cache(maxsize=1024)(torch.inference_mode(False)(_tap_counts))
