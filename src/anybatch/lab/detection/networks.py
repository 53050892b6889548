"""Backbones: what a detector's pyramid is built on, and where their weights come from."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.integrations._hosts import require
from anybatch.lab.networks import ResNet

__all__ = ["NETWORKS", "Network", "SmallBody"]


class SmallBody(ResNet):
    """Stem of stride 2, three stages of one basic block; its state names are those of the lab's small network.

    Shape: (N, 3, H, W) -> the outputs of the stages by name, "layer1" to "layer3", at strides 2, 4 and 8.
    """

    def __init__(self) -> None:
        super().__init__(1, 3, (16, 32, 64), (1, 1, 1))
        self.conv1.stride = (2, 2)
        del self.fc

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":  # type: ignore[override]
        """The stages' outputs."""
        x = F.relu(self.bn1(self.conv1(x)))
        outputs: OrderedDict[str, Tensor] = OrderedDict()
        for stage in range(1, self.stages + 1):
            x = outputs[f"layer{stage}"] = self.get_submodule(f"layer{stage}")(x)
        return outputs


@dataclass(frozen=True)
class Network:
    """A backbone and the sizes of what is built on it.

    Attributes:
        build: the body, with BatchNorm, untrained; its output is a dict of stage outputs, "layer1", ...
        widths: channels of the stages.
        channels: of the pyramid and of the heads' convolutions.
        convs: of each head; hidden: features of the box head's last layer.
        rois: proposals an image that the box head learns from.
        fixed: parts that are not trained further where weights are given.
    """

    build: Callable[[], nn.Module]
    widths: tuple[int, ...]
    channels: int
    convs: int
    hidden: int
    rois: int
    fixed: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether it is for small images: pyramids from stride 4 to 16."""
        return len(self.widths) == 3


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = require("torchvision.models", "detect")
        utils = require("torchvision.models._utils", "detect")
        stages = {f"layer{stage}": f"layer{stage}" for stage in range(1, 5)}
        body: nn.Module = utils.IntermediateLayerGetter(models.get_model(name, weights=None), stages)
        return body

    return build


def _large(name: str, expansion: int) -> Network:
    widths = tuple(expansion * width for width in (64, 128, 256, 512))
    return Network(_torchvision(name), widths, 256, 4, 1024, 512, ("conv1", "bn1", "layer1"))


NETWORKS: dict[str, Network] = {
    "small-resnet": Network(SmallBody, (16, 32, 64), 48, 2, 96, 64),
    "resnet18": _large("resnet18", 1),
    "resnet34": _large("resnet34", 1),
    "resnet50": _large("resnet50", 4),
    "resnet101": _large("resnet101", 4),
}
