"""segment: trains and compares segmenters."""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.app import app
from anybatch.cli.options import (
    Compare,
    Device,
    DryRun,
    Epochs,
    GradientBatch,
    Jobs,
    Methods,
    NormBatches,
    Recipe,
    Resume,
    SaveEvery,
    Seed,
    Seeds,
    TaskMode,
    TaskRate,
    WeightDecay,
)
from anybatch.cli.tasks import Asked


@app.command()
def segment(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoint, report and events.", show_default="results/segment"),
    ] = None,
    method: Methods = None,
    batch: NormBatches = None,
    compare: Compare = False,
    seed: Seed = 0,
    seeds: Seeds = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images/ and masks/, or of imagesTr/ and labelsTr/ with NIfTI volumes; or 'volumes' or "
            "'scenes': garments of Fashion-MNIST in noise, in three or two dimensions, made on the spot.",
            show_default="volumes",
        ),
    ] = None,
    train_examples: Annotated[
        int | None, typer.Option(min=1, help="Train on only the first so many.", show_default="all")
    ] = None,
    test_examples: Annotated[
        int | None, typer.Option(min=1, help="Test on only the first so many.", show_default="all")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="MONAI's 'unet', 'basic-unet' or 'segresnet'.", show_default="unet")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of its first level.", show_default="8")] = None,
    patch: Annotated[
        int | None,
        typer.Option(
            help="Pixels or voxels a side of what is trained on.", show_default="128 of images, 64 of NIfTI volumes"
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side that images are resized to.", show_default="as they are")
    ] = None,
    spacing: Annotated[
        float | None,
        typer.Option(help="Millimetres between voxels that volumes are resampled to.", show_default="as they are"),
    ] = None,
    intensity: Annotated[
        str | None,
        typer.Option(
            help="Normalise an example by its own mean and variance ('example'), or by those of all training examples "
            "('data').",
            show_default="example for NIfTI volumes that are no CT, else data",
        ),
    ] = None,
    epochs: Epochs = None,
    lr: TaskRate = None,
    weight_decay: WeightDecay = None,
    gradient_batch: GradientBatch = None,
    mode: TaskMode = None,
    device: Device = "cpu",
    resume: Resume = False,
    save_every: SaveEvery = None,
    recipe: Recipe = None,
    dry_run: DryRun = False,
    jobs: Jobs = None,
) -> None:
    """Train a network of MONAI's to segment with the norm of your choice, and measure Dice and IoU; or compare norms.

    Without options: a small 3-d U-Net on generated volumes with CBN, one volume at a time; minutes on one core. With
    --compare: BatchNorm, GroupNorm and CBN at 1, 2 and 4 volumes, against BatchNorm at 8. On several devices: torchrun
    --nproc-per-node 2 -m anybatch segment ...
    """
    from anybatch.lab.segmentation.config import SegmentConfig

    options = {
        "data": data,
        "train_examples": train_examples,
        "test_examples": test_examples,
        "network": network,
        "width": width,
        "patch": patch,
        "image_size": image_size,
        "spacing": spacing,
        "intensity": intensity,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "gradient_batch": gradient_batch,
        "mode": mode.value if mode else None,
        "device": device,
    }
    asked = Asked(out, method, batch, compare, seed, seeds, resume, save_every, recipe, dry_run, jobs)
    asked.run(SegmentConfig, options)
