"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    *(
        "AtOnce",
        "Augment",
        "Batches",
        "Checkpoint",
        "Compare",
        "Data",
        "Device",
        "DryRun",
        "Epochs",
        "GradientBatch",
        "GradientMode",
    ),
    *("ImageSize", "Jobs", "LearningRate", "MethodName", "Methods", "MicroBatches", "Mode", "Model", "Network"),
    *("NormBatches", "NormWeightDecay", "Recipe", "Resume", "SaveEvery", "Seed", "Seeds", "TaskMode", "TaskRate"),
    *("TestImages", "TrainImages", "TrainingRate", "WeightDecay", "typed_in"),
]


def typed_in(context: typer.Context) -> set[str]:
    """The parameters that were typed, and did not take their defaults."""
    return {each for each in context.params if (s := context.get_parameter_source(each)) and s.name == "COMMANDLINE"}


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
Augment = Annotated[
    bool, typer.Option("--augment", help="Shift training images by up to 4 pixels, and mirror half of them.")
]
AtOnce = Annotated[
    bool,
    typer.Option(
        "--at-once/--one-by-one",
        help="Give the network the small batches of a step at once where the method makes the same of them so, on a CPU"
        "; or always one after another.",
    ),
]
Network = Annotated[str, typer.Option(help="'small-resnet', 'wide-resnet', 'deep-resnet' or 'resnet18'.")]
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

# Of detect and segment. Where nothing is said, the task's own default counts, or the recipe's.
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="As 'anybatch methods' lists them, with options: 'cbn(window=16)'; with --compare, repeat for several.",
        show_default="the task's CBN; with --compare several",
    ),
]
NormBatches = Annotated[
    list[int] | None,
    typer.Option(
        "--batch",
        help="Examples a layer sees at once; divides the gradient batch; with --compare, repeat for several.",
        show_default="1; with --compare 1, 2 and 4",
    ),
]
Compare = Annotated[bool, typer.Option("--compare", help="Train with every method at every batch size, and compare.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights and of the order of the examples.")]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="With --compare: runs of each; intervals need at least 2.", show_default="1")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the training examples.", show_default="the task's")
]
TaskRate = Annotated[
    float | None,
    typer.Option(help="For the gradient batch of the task's default; falls to 0.", show_default="the task's"),
]
WeightDecay = Annotated[float | None, typer.Option(help="Of all parameters.", show_default="the task's")]
GradientBatch = Annotated[int | None, typer.Option(min=1, help="Examples a step of the optimizer.", show_default="8")]
TaskMode = Annotated[
    Mode | None,
    typer.Option(
        help="Below the gradient batch: accumulate gradients to it, or step every time at a rate in proportion.",
        show_default="accumulate",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from --out, exactly as if never stopped.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="Save after so many steps, too.", show_default="after every epoch")
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        help="A file of option values (.toml), or the name of one in docs/recipes.md; what is typed goes first."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Build the model, take two steps on generated data of the real shape, estimate time and memory.",
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="With --compare: runs at a time.", show_default="one a core")]
