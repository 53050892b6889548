"""MONAI's networks with BatchNorm, by name; `anybatch.convert_` then puts the method in its place."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from anybatch.integrations._hosts import require

__all__ = ["NETWORKS", "Network"]


@dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
        build: of the spatial dimensions (2 or 3), channels of the image, classes, and channels of the first level.
        multiple: what the sides of its input are multiples of.
    """

    build: Callable[[int, int, int, int], nn.Module]
    multiple: int


def _unet(dims: int, channels: int, classes: int, width: int) -> nn.Module:
    """Residual units, strided convolutions: every norm follows one."""
    widths = tuple(width * 2**level for level in range(4))
    nets = require("monai.networks.nets", "segment")
    net: nn.Module = nets.UNet(dims, channels, classes, widths, (2, 2, 2), num_res_units=2, norm="batch")
    return net


def _basic_unet(dims: int, channels: int, classes: int, width: int) -> nn.Module:
    """Two convolutions a level, max pooling: every norm follows one."""
    widths = (width, width, 2 * width, 4 * width, 8 * width, width)
    net: nn.Module = require("monai.networks.nets", "segment").BasicUNet(dims, channels, classes, widths, norm="batch")
    return net


def _segresnet(dims: int, channels: int, classes: int, width: int) -> nn.Module:
    """Residual blocks in pre-activation order: half of its norms follow a sum."""
    nets = require("monai.networks.nets", "segment")
    net: nn.Module = nets.SegResNet(dims, width, channels, classes, norm="batch")
    return net


NETWORKS: dict[str, Network] = {
    "unet": Network(_unet, 8),
    "basic-unet": Network(_basic_unet, 16),
    "segresnet": Network(_segresnet, 8),
}
