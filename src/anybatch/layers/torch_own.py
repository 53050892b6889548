"""torch's own BatchNorm and GroupNorm as rows of the table: the reference, and the batch-free alternative."""

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import NormLayer
from .config import NormConfig
from .fused import keep_tail
from .ghost import GhostBN
from .options import check_whole

__all__ = ["BN", "GN"]


@dataclass(frozen=True)
class BN(NormConfig):
    """torch's own BatchNorm: the reference, and the way back."""

    def __post_init__(self) -> None:
        pass

    def in_groups(self, examples: int) -> GhostBN:
        """Ghosts, the running statistics of each after the other."""
        return GhostBN(examples, "ghosts")

    def build(self, bn: _BatchNorm) -> nn.Module:
        """``bn`` itself, or plain BatchNorm where it is a layer of this library."""
        return bn.to_batchnorm() if isinstance(bn, NormLayer) else bn


@dataclass(frozen=True)
class GN(NormConfig):
    """torch's own GroupNorm, for comparison; it keeps no running statistics, so their names leave the state_dict.

    Args:
        groups: of channels; where it does not divide them, their greatest common divisor with it.
    """

    groups: int = 32

    def __post_init__(self) -> None:
        check_whole("GN", "groups", self.groups)

    def in_groups(self, examples: int) -> "GN":
        """Itself: it sees one example at a time."""
        return self

    def build(self, bn: _BatchNorm) -> nn.Module:
        """nn.GroupNorm with the affine parameters of ``bn``."""
        channels = bn.num_features
        layer = nn.GroupNorm(math.gcd(self.groups, channels), channels, bn.eps, affine=False)
        layer.affine = bn.affine
        layer.weight, layer.bias = bn.weight, bn.bias
        keep_tail(bn, layer)
        return layer.train(bn.training)
