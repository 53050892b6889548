"""No normalization: what is left of BatchNorm when its moments are taken away, to see what they do.

    out = gamma * y + beta

gamma and beta are the norm's, so at initialization (1 and 0) this is the identity, and the network has the scale that
its initial weights give it: what "Understanding Batch Normalization" (Bjorck, Gomes, Selman, Weinberger; NeurIPS 2018;
arXiv 1806.02375) compares BatchNorm with. Training and evaluation are the same. Running statistics stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.affine import per_channel
from ..core.moments import compute_dtype
from .base import NormLayer
from .config import NormConfig

__all__ = ["NoNorm", "NoNormalization"]


class NoNormalization(NormLayer):
    """Scales and shifts (N, C, *) per channel, and normalises nothing.

    out = gamma * y + beta

    Args:
        num_features: C.
        eps: kept for the way back to BatchNorm; nothing is divided.
        momentum: likewise.
        affine: whether the layer has gamma and beta; without them it is the identity.
        track_running_stats: whether it has the running statistics, which it leaves as they are.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's; the running statistics never move.

    Raises:
        AnybatchError: an input that does not fit the layer.

    Source: arXiv 1806.02375, its networks without normalization.
    """

    takes_single_values = True
    can_weigh = False
    uses_running = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    def normalise(self, y: Tensor) -> Tensor:
        """Gamma * y + beta, in float32 or better."""
        out = y if self.weight is None else y * per_channel(self.weight, y).to(compute_dtype(y.dtype))
        out = out if self.bias is None else out + per_channel(self.bias, y)
        return out.to(y.dtype)

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Zero and 1 - eps, by which BatchNorm's evaluation does what training does here, to rounding."""
        like = next(iter((*self.parameters(), *self.buffers())), torch.empty(0))
        zeros = like.new_zeros(self.num_features, dtype=compute_dtype(like.dtype)).detach()
        return zeros, zeros + (1 - self.eps)


@dataclass(frozen=True)
class NoNorm(NormConfig):
    """No normalization: the norm's own scale and shift, and nothing else."""

    layer: ClassVar[type[NormLayer]] = NoNormalization

    def in_groups(self, examples: int) -> "NoNorm":
        """Itself: it sees one example at a time."""
        return self
