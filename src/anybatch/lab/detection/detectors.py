"""torchvision's detectors, built so that each part can be given a norm or none."""

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.integrations._hosts import require
from anybatch.lab.detection.networks import Network

__all__ = ["DETECTORS", "LONGEST", "PARTS", "build_detector"]

Norm = Callable[[int], nn.Module] | None

LONGEST = 1333 / 800  # of an image's longer side, in shorter ones

PARTS: dict[str, tuple[str, ...]] = {
    "backbone": ("backbone.body.*",),
    "neck": ("backbone.fpn.*",),
    "heads": ("head.*", "rpn.*", "roi_heads.*"),
}
"""Glob patterns of the names of each part's norms."""


class _Backbone(nn.Module):
    """Body and feature pyramid, named as in torchvision's detectors."""

    def __init__(self, body: nn.Module, stages: list[int], network: Network, extra: nn.Module, norm: Norm) -> None:
        super().__init__()
        ops = require("torchvision.ops.feature_pyramid_network", "detect")
        self.body = body
        self.stages = [f"layer{stage}" for stage in stages]
        widths = [network.widths[stage - 1] for stage in stages]
        self.fpn = ops.FeaturePyramidNetwork(widths, network.channels, extra_blocks=extra, norm_layer=norm)
        self.out_channels = network.channels

    def forward(self, x: Any) -> Any:
        """Images to the levels of the pyramid, finest first."""
        outputs = self.body(x)
        return self.fpn({str(place): outputs[stage] for place, stage in enumerate(self.stages)})


def build_detector(
    name: str, network: Network, body: nn.Module, classes: int, neck: bool, heads: bool, size: int
) -> nn.Module:
    """A detector with torch's BatchNorm in the parts that are to have a norm.

    Args:
        name: a key of `DETECTORS`.
        network: sizes.
        body: the backbone.
        classes: background included.
        neck: whether the pyramid's convolutions are followed by norms.
        heads: likewise the heads'. The proposal network of Faster and Mask R-CNN has none, as in the paper.
        size: pixels that the shorter side of an image is scaled to; the longer is at most `LONGEST` times that.
    """
    norms = [nn.BatchNorm2d if wanted else None for wanted in (neck, heads)]
    sizes = {"min_size": size, "max_size": round(size * LONGEST)}
    model: nn.Module = DETECTORS[name](network, body, classes, *norms, sizes)
    return model


def _faster_rcnn(
    network: Network, body: nn.Module, classes: int, neck: Norm, heads: Norm, sizes: dict[str, int], **more: Any
) -> nn.Module:
    detection = require("torchvision.models.detection.faster_rcnn", "detect")
    fpn, ops = require("torchvision.ops.feature_pyramid_network", "detect"), require("torchvision.ops", "detect")
    stages = [2, 3] if network.small else [1, 2, 3, 4]
    backbone = _Backbone(body, stages, network, fpn.LastLevelMaxPool(), neck)
    levels = [str(place) for place in range(len(stages))]
    width = network.channels
    head = detection.FastRCNNConvFCHead((width, 7, 7), [width] * network.convs, [network.hidden], norm_layer=heads)
    build = more.pop("build", detection.FasterRCNN)
    return build(  # type: ignore[no-any-return]
        backbone,
        rpn_anchor_generator=_anchors(len(stages) + 1, 16 if network.small else 32, (0.5, 1.0, 2.0)),
        box_roi_pool=ops.MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        box_head=head,
        box_predictor=detection.FastRCNNPredictor(network.hidden, classes),
        box_batch_size_per_image=network.rois,
        **({"rpn_batch_size_per_image": 64} | _proposals(200, 100) if network.small else {}),
        **sizes,
        **more,
    )


def _mask_rcnn(
    network: Network, body: nn.Module, classes: int, neck: Norm, heads: Norm, sizes: dict[str, int]
) -> nn.Module:
    detection, ops = require("torchvision.models.detection.mask_rcnn", "detect"), require("torchvision.ops", "detect")
    levels = [str(place) for place in range(2 if network.small else 4)]
    width = network.channels
    return _faster_rcnn(
        network,
        body,
        classes,
        neck,
        heads,
        sizes,
        build=detection.MaskRCNN,
        mask_roi_pool=ops.MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        mask_head=detection.MaskRCNNHeads(width, [width] * network.convs, 1, norm_layer=heads),
        mask_predictor=detection.MaskRCNNPredictor(width, width, classes),
    )


def _retinanet(
    network: Network, body: nn.Module, classes: int, neck: Norm, heads: Norm, sizes: dict[str, int]
) -> nn.Module:
    detection = require("torchvision.models.detection.retinanet", "detect")
    backbone, levels = _dense(network, body, neck)
    unit = 16 if network.small else 32
    scales = tuple(tuple(int(unit * 2 ** (level + third / 3)) for third in range(3)) for level in range(levels))
    anchors = require("torchvision.models.detection.anchor_utils", "detect").AnchorGenerator(
        scales, ((0.5, 1.0, 2.0),) * levels
    )
    head = detection.RetinaNetHead(network.channels, anchors.num_anchors_per_location()[0], classes, norm_layer=heads)
    for tower in (head.classification_head, head.regression_head):
        _shorten(tower, network.convs)
    return detection.RetinaNet(backbone, classes, anchor_generator=anchors, head=head, **sizes)  # type: ignore[no-any-return]


def _fcos(network: Network, body: nn.Module, classes: int, neck: Norm, heads: Norm, sizes: dict[str, int]) -> nn.Module:
    detection = require("torchvision.models.detection.fcos", "detect")
    backbone, levels = _dense(network, body, neck)
    anchors = _anchors(levels, 4 if network.small else 8, (1.0,))
    norm = heads or (lambda channels: nn.Identity())  # its own default is GroupNorm of 32 groups
    head = detection.FCOSHead(32, 1, classes, 0)
    head.classification_head = detection.FCOSClassificationHead(
        network.channels, 1, classes, network.convs, norm_layer=norm
    )
    head.regression_head = detection.FCOSRegressionHead(network.channels, 1, network.convs, norm_layer=norm)
    return detection.FCOS(backbone, classes, anchor_generator=anchors, head=head, **sizes)  # type: ignore[no-any-return]


def _dense(network: Network, body: nn.Module, neck: Norm) -> tuple[_Backbone, int]:
    """Backbone and number of levels of a detector without proposals: strides 8 to 128, or 4 to 16."""
    fpn = require("torchvision.ops.feature_pyramid_network", "detect")
    if network.small:
        return _Backbone(body, [2, 3], network, fpn.LastLevelMaxPool(), neck), 3
    width = network.channels
    return _Backbone(body, [2, 3, 4], network, fpn.LastLevelP6P7(width, width), neck), 5


def _anchors(levels: int, finest: int, ratios: tuple[float, ...]) -> Any:
    """Boxes of one size a level, doubling from level to level."""
    utils = require("torchvision.models.detection.anchor_utils", "detect")
    return utils.AnchorGenerator(tuple((finest * 2**level,) for level in range(levels)), (ratios,) * levels)


def _shorten(tower: nn.Module, convs: int) -> None:
    """RetinaNet's towers have four blocks; small networks take fewer."""
    tower.conv = nn.Sequential(*list(tower.conv)[:convs])  # type: ignore[arg-type]


def _proposals(before: int, after: int) -> dict[str, int]:
    """How many proposals an image to keep before and after suppression."""
    return {
        f"rpn_{when}_nms_top_n_{mode}": count
        for when, count in (("pre", before), ("post", after))
        for mode in ("train", "test")
    }


DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "faster-rcnn": _faster_rcnn,
    "mask-rcnn": _mask_rcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
}
