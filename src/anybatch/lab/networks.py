"""Small residual networks, built with BatchNorm; `anybatch.convert_` then puts the method in its place."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.errors import AnybatchError
from anybatch.methods import METHODS

__all__ = [
    *("NETWORKS", "BasicBlock", "ResNet", "all_methods", "build", "check_network", "deep_resnet", "resnet18"),
    *("small_resnet", "wide_resnet"),
]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """3x3 stem, one stage of basic blocks per width (every stage but the first halves the image), pooling, linear.

    The state names are torchvision's: conv1, bn1, layer1.0.conv1, ..., fc.

    Args:
        widths: channels of each stage; the stem has the first.
        blocks: basic blocks in each stage.
    """

    def __init__(self, classes: int, in_channels: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layer = nn.Sequential()
            for stride in strides:
                layer.append(BasicBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (N, in_channels, H, W) -> (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def small_resnet(classes: int, in_channels: int = 1, widths: Sequence[int] = (12, 24, 48)) -> ResNet:
    """Three stages of one basic block: 51,000 parameters, seconds an epoch on one CPU core."""
    return ResNet(classes, in_channels, widths, [1] * len(widths))


def deep_resnet(classes: int, in_channels: int = 1, widths: Sequence[int] = (12, 24, 48)) -> ResNet:
    """Three stages of five basic blocks: 33 layers, 262,000 parameters, deep enough to fail without normalization."""
    return ResNet(classes, in_channels, widths, [5] * len(widths))


def wide_resnet(classes: int, in_channels: int = 1, widths: Sequence[int] = (24, 48, 96)) -> ResNet:
    """`small_resnet` of twice the channels: 174,000 parameters."""
    return ResNet(classes, in_channels, widths, [1] * len(widths))


def resnet18(classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: a 3x3 stem of stride 1 and no max pooling."""
    return ResNet(classes, in_channels, (64, 128, 256, 512), (2, 2, 2, 2))


NETWORKS: dict[str, Callable[[int, int], ResNet]] = {
    "small-resnet": small_resnet,
    "deep-resnet": deep_resnet,
    "wide-resnet": wide_resnet,
    "resnet18": resnet18,
}


def check_network(name: str) -> None:
    """Raises AnybatchError unless there is a network called `name`."""
    if name not in NETWORKS:
        raise AnybatchError(f"there is no network '{name}': choose one of {', '.join(NETWORKS)}")


def build(name: str, classes: int, in_channels: int) -> ResNet:
    """The network called `name`.

    Raises:
        AnybatchError: there is none of that name.
    """
    check_network(name)
    return NETWORKS[name](classes, in_channels)


def all_methods(name: str) -> tuple[str, ...]:
    """Every method of the table, as typed, with options that fit the channels of the network called `name`."""
    with torch.device("meta"):
        norms = [module for module in build(name, 2, 1).modules() if isinstance(module, nn.BatchNorm2d)]
    narrow = any(norm.num_features % 32 for norm in norms)
    return tuple(row.trial if narrow else row.name for row in METHODS.values())
