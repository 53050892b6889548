"""detect: trains and compares detectors."""

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
def detect(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoint, report and events.", show_default="results/detect"),
    ] = None,
    method: Methods = None,
    batch: NormBatches = None,
    compare: Compare = False,
    seed: Seed = 0,
    seeds: Seeds = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder in COCO format (annotations/instances_train.json and train/, ...), or 'scenes': garments of "
            "Fashion-MNIST on textures, made on the spot.",
            show_default="scenes",
        ),
    ] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Scenes to train on.", show_default="600")] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="'faster-rcnn', 'mask-rcnn', 'retinanet' or 'fcos'.", show_default="faster-rcnn"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="'small-resnet', 'resnet18', 'resnet34', 'resnet50', 'resnet101'.", show_default="small-resnet"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the backbone: 'garments' (small-resnet's, learnt from single garments on the spot), 'imagenet' "
            "(torchvision's), a file of a state_dict, or 'none'.",
            show_default="garments",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Norm of the backbone: 'frozen', 'method' (that of --method) or another method.",
            show_default="frozen; small-resnet: method",
        ),
    ] = None,
    neck: Annotated[
        str | None,
        typer.Option(help="Norm of the feature pyramid: 'method', 'none' or another.", show_default="method"),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Norm of the heads: 'method', 'none' or another.", show_default="method")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels that an image's shorter side is scaled to.", show_default="800; scenes: their own"),
    ] = None,
    drop_invalid: Annotated[
        bool | None,
        typer.Option(
            "--drop-invalid/--no-drop-invalid", help="Leave unusable annotations out, counted, instead of stopping."
        ),
    ] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the training images.", show_default="flip")] = None,
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
    """Train a detector with the norms of your choice, and measure it as COCO does; or compare norms.

    Without options: a small Faster R-CNN on generated scenes with CBN in neck and heads, one image at a time; minutes
    on one core. With --compare: BatchNorm, GroupNorm, frozen BatchNorm and CBN at 1, 2 and 4 images, against BatchNorm
    at 8. A method besides the table is 'frozen': no norm in neck and heads. On several devices: torchrun
    --nproc-per-node 2 -m anybatch detect ...
    """
    from anybatch.lab.detection.config import DetectConfig

    options = {
        "data": data,
        "scenes": scenes,
        "detector": detector,
        "network": network,
        "weights": weights,
        "backbone": backbone,
        "neck": neck,
        "heads": heads,
        "image_size": image_size,
        "drop_invalid": drop_invalid,
        "flip": flip,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "gradient_batch": gradient_batch,
        "mode": mode.value if mode else None,
        "device": device,
    }
    asked = Asked(out, method, batch, compare, seed, seeds, resume, save_every, recipe, dry_run, jobs)
    asked.run(DetectConfig, options)
