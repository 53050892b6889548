"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    *("Batches", "Checkpoint", "Data", "Device", "GradientMode", "ImageSize", "LearningRate", "MethodName"),
    *("MicroBatches", "Mode", "Model", "Network", "NormWeightDecay", "TestImages", "TrainImages", "TrainingRate"),
]


class Mode(StrEnum):
    """How gradients of micro-batches become steps."""

    accumulate = "accumulate"
    step = "step"


MethodName = Annotated[str, typer.Option(help="As 'anybatch methods' lists them, with options: 'cbn(window=16)'.")]
Data = Annotated[
    str, typer.Option(help="'embedded' (8,000 images in the package), 'fashion-mnist', or a folder of images.")
]
TrainImages = Annotated[int | None, typer.Option(help="Train on only the first so many.", show_default="all")]
TestImages = Annotated[int | None, typer.Option(help="Test on only the first so many.", show_default="all")]
ImageSize = Annotated[int, typer.Option(help="Pixels a side that the images of a folder are resized to.")]
Network = Annotated[str, typer.Option(help="'small-resnet', 'deep-resnet' or 'resnet18'.")]
LearningRate = Annotated[float, typer.Option(help="For a gradient batch of 32; falls to 0 along a cosine.")]
GradientMode = Annotated[
    Mode,
    typer.Option(help="Below batch 32: accumulate gradients to 32 images, or step every time at lr * batch / 32."),
]
NormWeightDecay = Annotated[
    float | None,
    typer.Option(
        help="Decay gamma towards 1 and beta towards 0 at this rate.", show_default="towards 0, as all parameters"
    ),
]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:1', ...")]
Model = Annotated[
    str | None,
    typer.Option(help="'package.module:function', which builds a classifier, instead of --network."),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder of 'anybatch train': its model and data, instead of the options for these.")
]
Batches = Annotated[int, typer.Option(min=1, help="Batches to measure on.")]
MicroBatches = Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step of the optimizer.")]
TrainingRate = Annotated[float, typer.Option(help="Learning rate of your training.")]
