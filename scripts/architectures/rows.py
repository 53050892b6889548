"""The architectures of the table: how each is built, small and without weights, and what one forward of it takes."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["ROWS", "SAMPLE", "Row"]


def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a model puts out."""
    return model(*args, **kwargs)


@dataclass(frozen=True)
class Row:
    """One public architecture.

    Args:
        library: that it is of; with the name it names the row.
        name: in its library, with the options that matter.
        build: makes it, with random weights.
        inputs: what one forward takes, as `ab.convert_` wants its example inputs.
        training: the same in training mode, where that takes more (targets).
        outputs: what evaluations are compared by, of the model and its arguments; by default what the model puts out.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    training: Callable[[], Any] | None = None
    outputs: Callable[..., Any] = call

    @property
    def key(self) -> str:
        """What the row is called."""
        return f"{self.library}/{self.name}"


def images(*shape: int) -> Callable[[], torch.Tensor]:
    """Two random images, unless the shape says otherwise: (height,), (height, width) or all of it."""
    whole = {1: (2, 3, shape[0], shape[0]), 2: (2, 3, *shape)}.get(len(shape), shape)
    return lambda: torch.randn(whole)


def torchvision_models() -> Iterator[Row]:
    def row(name: str, inputs: Callable[[], Any] | None = None, **options: Any) -> Row:
        def build() -> nn.Module:
            return importlib.import_module("torchvision.models").get_model(name, weights=None, **options)

        return Row("torchvision", name, build, inputs or images(64))

    for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg11_bn"):
        yield row(name)
    yield row("googlenet", init_weights=False)
    yield row("inception_v3", images(1, 3, 299, 299), init_weights=False)  # its auxiliary head wants no less
    for name in ("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf"):
        yield row(name)
    for name in ("regnet_y_400mf", "efficientnet_b0", "efficientnet_v2_s"):
        yield row(name)
    yield row("maxvit_t", images(224))
    for name in ("squeezenet1_1", "convnext_tiny", "swin_t"):
        yield row(name)
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        yield row(name, images(2, 3, 8, 32, 32))
    yield row("s3d", images(1, 3, 14, 224, 224))
    yield row("raft_small", lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)))
    yield row("raft_large", lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)))
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"):
        yield row(name, weights_backbone=None, aux_loss=True)
    yield row("lraspp_mobilenet_v3_large", weights_backbone=None)


def torchvision_detectors() -> Iterator[Row]:
    def row(name: str, size: int = 64, count: int = 1, **options: Any) -> Row:
        def build() -> nn.Module:
            make = importlib.import_module("torchvision.models").get_model
            return make(name, weights=None, weights_backbone=None, num_classes=2, **options)

        def pictures() -> tuple[list[torch.Tensor]]:
            return ([torch.rand(3, size, size) for _ in range(count)],)

        def with_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
            mask = torch.zeros(1, size, size, dtype=torch.uint8)
            mask[:, 8:40, 8:48] = 1
            target = {
                "boxes": torch.tensor([[8.0, 8.0, 48.0, 40.0]]),
                "labels": torch.tensor([1]),
                "masks": mask,
                "keypoints": torch.tensor([[[12.0, 12.0, 1.0]] * 17]),
            }
            return (*pictures(), [target] * count)

        return Row("torchvision", name, build, pictures, with_targets, before_selection)

    for name in (
        *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
        *("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"),
        *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"),
    ):
        yield row(name, min_size=64, max_size=64)
    yield row("ssdlite320_mobilenet_v3_large", count=2)
    yield row("ssd300_vgg16")


def before_selection(model: Any, pictures: list[torch.Tensor]) -> list[Any]:
    """What the parts of a detector compute: thresholds and suppression would make another box of a rounding error."""
    batch, _ = model.transform(pictures)
    features = model.backbone(batch.tensors)
    levels = list(features.values())
    if not hasattr(model, "rpn"):
        return [model.head(levels)]
    boxes, outputs = [torch.tensor([[4.0, 8.0, 50.0, 60.0], [0.0, 0.0, 30.0, 20.0]])], [model.rpn.head(levels)]
    for part in ("box", "mask", "keypoint"):
        if getattr(model.roi_heads, f"{part}_predictor", None) is not None:
            pool, head, predict = (getattr(model.roi_heads, f"{part}_{of}") for of in ("roi_pool", "head", "predictor"))
            outputs.append(predict(head(pool(features, boxes, batch.image_sizes))))
    return outputs


def timm_models() -> Iterator[Row]:
    def row(name: str, size: int = 64, **options: Any) -> Row:
        def build() -> nn.Module:
            return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)

        return Row("timm", name, build, images(size))

    for name in (
        *("resnet10t", "resnet26t", "resnetblur18", "seresnet18", "legacy_seresnet18", "ecaresnet26t", "gcresnet33ts"),
        *("resnetv2_50", "res2net50_14w_8s", "res2next50", "resnest14d", "skresnet18", "dpn48b", "dla34"),
        *("densenet121", "densenetblur121d", "cspresnet50", "cspdarknet53", "cs3darknet_s", "hrnet_w18_small"),
        *("regnetx_002", "regnety_002", "regnetz_005", "gernet_s", "repvgg_a0", "mobileone_s0", "repvit_m0_9"),
        *("efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0", "mixnet_s", "mnasnet_small", "tinynet_e"),
        *("lcnet_035", "hardcorenas_a", "fbnetc_100", "fbnetv3_b", "spnasnet_100", "mobilenetv3_small_050"),
        *("mobilenetv4_conv_small_035", "mobilenet_edgetpu_v2_xs", "rexnet_100", "ghostnet_050", "ghostnetv2_100"),
        *("ghostnetv3_050", "repghostnet_050", "selecsls42b", "vovnet39a", "ese_vovnet19b_dw", "hgnetv2_b0"),
        *("starnet_s1", "xception41", "xception41p", "fasternet_t0", "convmixer_768_32", "efficientvit_b0"),
        *("inception_next_atto", "nf_resnet26", "nfnet_f0"),
    ):
        yield row(name)
    yield row("tresnet_m")
    for name in ("inception_v4", "inception_resnet_v2", "pnasnet5large", "nasnetalarge"):
        yield row(name, 96)
    for name in ("mobilevit_xxs", "mobilevitv2_050", "fastvit_t8", "lambda_resnet26t"):
        yield row(name, 128)
    yield row("botnet26t_256", 256)
    yield row("levit_128s", 224)
    yield row("efficientformer_l1", 224)
    yield row("efficientformerv2_s0", 224)
    yield row("efficientvit_m0", 224)
    yield row("visformer_tiny", 224)
    yield row("coatnet_bn_0_rw_224", 224)
    yield row("tiny_vit_5m_224", 224)
    yield row("swiftformer_xs", 224)
    yield row("shvit_s1", 224)


def transformers_models() -> Iterator[Row]:
    def row(model: str, config: str, inputs: Callable[[], Any], **options: Any) -> Row:
        def build() -> nn.Module:
            library = importlib.import_module("transformers")
            return getattr(library, model)(getattr(library, config)(**options))

        return Row("transformers", model, build, inputs)

    stages = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]}
    yield row("ResNetForImageClassification", "ResNetConfig", images(64), **stages)
    yield row("RegNetForImageClassification", "RegNetConfig", images(64), groups_width=8, **stages)
    yield row("MobileNetV1ForImageClassification", "MobileNetV1Config", images(64), depth_multiplier=0.25)
    yield row("MobileNetV2ForImageClassification", "MobileNetV2Config", images(64), depth_multiplier=0.25)
    yield row("EfficientNetForImageClassification", "EfficientNetConfig", images(64))
    yield row("LevitForImageClassification", "LevitConfig", images(224))
    yield row("MobileViTForSemanticSegmentation", "MobileViTConfig", images(128))
    yield row("MobileViTV2ForImageClassification", "MobileViTV2Config", images(128))
    yield row("SegformerForSemanticSegmentation", "SegformerConfig", images(64))
    beit = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    beit |= {"intermediate_size": 64, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
    yield row("BeitForSemanticSegmentation", "BeitConfig", images(32), **beit)
    yield row("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", images(32), **beit)
    yield row("DPTForSemanticSegmentation", "DPTConfig", images(64), num_hidden_layers=12)
    yield row("CvtForImageClassification", "CvtConfig", images(64))
    yield row("HGNetV2ForImageClassification", "HGNetV2Config", images(64))
    yield row("SwiftFormerForImageClassification", "SwiftFormerConfig", images(224))
    yield row("TextNetForImageClassification", "TextNetConfig", images(64))
    for model in ("RTDetr", "RTDetrV2", "DFine"):
        yield row(f"{model}ForObjectDetection", f"{model}Config", images(64), num_queries=20)
    yield row(
        "DetrForObjectDetection", "DetrConfig", images(64), use_timm_backbone=False, use_pretrained_backbone=False
    )
    sound = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    yield row("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", lambda: torch.randn(2, 4000), **sound)
    yield row("PatchTSTModel", "PatchTSTConfig", lambda: torch.randn(2, 32, 3), num_input_channels=3)
    yield row("SuperGlueForKeypointMatching", "SuperGlueConfig", images(2, 2, 3, 64, 64))
    yield row("UperNetForSemanticSegmentation", "UperNetConfig", images(64))


def monai_models() -> Iterator[Row]:
    def row(model: str, shape: tuple[int, ...], as_name: str = "", /, **options: Any) -> Row:
        dimensions = len(shape) - 2
        kwargs = {"spatial_dims": dimensions, "in_channels": shape[1], "out_channels": 3, **options}

        def build() -> nn.Module:
            return getattr(importlib.import_module("monai.networks.nets"), model)(
                **{key: value for key, value in kwargs.items() if value is not None}
            )

        return Row("monai", as_name or f"{model}, {dimensions}-d", build, images(*shape))

    levels = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}
    for shape in ((2, 1, 64), (2, 1, 32, 32), (1, 1, 16, 16, 16)):
        yield row("UNet", shape, **levels)
    for shape in ((2, 1, 64), (2, 1, 32, 32), (1, 1, 32, 32, 32)):
        yield row("BasicUNet", shape, features=(4, 4, 8, 8, 16, 4), norm="batch")
    yield row("BasicUNetPlusPlus", (2, 1, 32, 32), features=(4, 4, 8, 8, 16, 4), norm="batch")
    yield row("SegResNet", (1, 1, 16, 16, 16), init_filters=8)
    yield row("SegResNet", (1, 1, 16, 16, 16), "SegResNet, 3-d, norm='BATCH'", init_filters=8, norm="BATCH")
    yield row("VNet", (1, 1, 32, 32, 32))
    # Of 32 voxels two a channel would be left in the last block, by which BatchNorm's gradients explode too.
    yield row("DenseNet121", (1, 1, 64, 64, 64))
    yield row("DenseNet121", (2, 1, 64))
    yield row(
        "DynUNet",
        (1, 1, 16, 16, 16),
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(4, 8, 16),
        norm_name="batch",
    )
    yield row("AttentionUnet", (1, 1, 16, 16, 16), channels=(4, 8, 16), strides=(2, 2))
    yield row("HighResNet", (1, 1, 8, 8, 8), norm_type="batch")
    yield row("FlexibleUNet", (2, 3, 64, 64), backbone="efficientnet-b0", pretrained=False)


def smp_models() -> Iterator[Row]:
    def row(model: str, encoder: str, size: int = 64, **options: Any) -> Row:
        def build() -> nn.Module:
            library = importlib.import_module("segmentation_models_pytorch")
            return getattr(library, model)(encoder, encoder_weights=None, classes=3, **options)

        return Row("segmentation_models_pytorch", f"{model}, {encoder}", build, images(size))

    for model in ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "MAnet", "Linknet"):
        yield row(model, "resnet18")
    yield row("PAN", "resnet18", 128)
    yield row("UPerNet", "resnet18")
    yield row("Segformer", "mit_b0")
    yield row("Unet", "efficientnet-b0")
    yield row("Unet", "densenet121")
    yield row("Unet", "mobilenet_v2")
    yield row("Unet", "se_resnet50")
    yield row("Unet", "timm-regnetx_002")


ROWS: tuple[Row, ...] = (
    *torchvision_models(),
    *torchvision_detectors(),
    *timm_models(),
    *transformers_models(),
    *monai_models(),
    *smp_models(),
)
# What the tests examine anew: quick, of every library and every kind.
SAMPLE = (
    "torchvision/densenet121",
    "torchvision/googlenet",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mc3_18",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "timm/tf_efficientnet_b0",
    "timm/repvgg_a0",
    "timm/levit_128s",
    "timm/nf_resnet26",
    "transformers/RegNetForImageClassification",
    "transformers/DetrForObjectDetection",
    "monai/UNet, 1-d",
    "monai/SegResNet, 3-d, norm='BATCH'",
    "segmentation_models_pytorch/Unet, resnet18",
)
