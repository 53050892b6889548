"""Commands that train: compare, train; and weigh, which tunes what was trained."""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from anybatch.cli.app import app
from anybatch.cli.options import (
    AtOnce,
    Augment,
    Data,
    Device,
    DryRun,
    GradientMode,
    ImageSize,
    LearningRate,
    MethodName,
    Mode,
    Network,
    NormWeightDecay,
    Recipe,
    TestImages,
    TrainImages,
    typed_in,
)
from anybatch.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.lab.config import TrainConfig


@app.command()
def compare(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="As for train; repeat for several; 'all' for the whole table. "
            "A burn-in may be a quoted fraction, as in \"cbn-paper(burn_in_steps='1/3')\": "
            "that share of the training forwards.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images a layer sees at once; divides 32; repeat for several.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each; intervals need at least 2.")] = None,
    data: Data = "embedded",
    train_images: TrainImages = None,
    test_images: TestImages = None,
    image_size: ImageSize = 64,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    network: Network = "small-resnet",
    augment: Augment = False,
    lr: LearningRate = 0.1,
    mode: GradientMode = Mode.accumulate,
    device: Device = "cpu",
    norm_weight_decay: NormWeightDecay = None,
    at_once: AtOnce = True,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one a core")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and report.")] = Path("results/compare"),
    quick: Annotated[bool, typer.Option("--quick", help="Few runs on few images: minutes, for a first look.")] = False,
) -> None:
    """Compare methods over batch sizes and seeds, against BatchNorm at batch 32; writes a report.

    Finished runs are kept: the same command goes on where it was stopped, and a larger one does only what is new.
    """
    from anybatch.lab import compare as lab
    from anybatch.lab import terminal
    from anybatch.lab.config import ClassifyConfig
    from anybatch.lab.data import BUILT_IN

    preset = lab.QUICK if quick else lab.FULL
    base = ClassifyConfig(
        data=data,
        train_images=preset.train_images if train_images is None and data in BUILT_IN else train_images,
        test_images=test_images,
        image_size=image_size,
        network=network,
        augment=augment,
        epochs=epochs or preset.epochs,
        lr=lr,
        mode=mode.value,
        device=device,
        norm_weight_decay=norm_weight_decay,
        at_once=at_once,
    )
    configs = lab.plan(base, method or preset.methods, batch or preset.batches, seeds or preset.seeds)
    command = shlex.join(["anybatch", *sys.argv[1:]])
    raise typer.Exit(terminal.compare(configs, out, jobs, command, Console(highlight=False)))


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Checkpoint folder: model.safetensors, training.pt, config.json.")] = Path(
        "results/train"
    ),
    method: MethodName = "cbn",
    batch: Annotated[int, typer.Option(help="Images a layer sees at once; divides 32.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the order of the images.")] = 0,
    data: Data = "embedded",
    train_images: TrainImages = None,
    test_images: TestImages = None,
    image_size: ImageSize = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 3,
    network: Network = "small-resnet",
    augment: Augment = False,
    lr: LearningRate = 0.1,
    mode: GradientMode = Mode.accumulate,
    device: Device = "cpu",
    norm_weight_decay: NormWeightDecay = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Save after so many steps, too.", show_default="after every epoch")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out, exactly as if never stopped.")] = False,
    recipe: Recipe = None,
    dry_run: DryRun = False,
) -> None:
    """Train one network with one method; saves a checkpoint after every epoch, and when it is asked to stop.

    Ctrl-C and SIGTERM let the step end; a second Ctrl-C does not.
    On several devices: torchrun --nproc-per-node 2 -m anybatch train ...
    """
    from anybatch.lab import terminal

    options = {
        "method": method,
        "batch": batch,
        "seed": seed,
        "data": data,
        "train_images": train_images,
        "test_images": test_images,
        "image_size": image_size,
        "network": network,
        "augment": augment,
        "epochs": epochs,
        "lr": lr,
        "mode": mode.value,
        "device": device,
        "norm_weight_decay": norm_weight_decay,
    }
    config = _configured(options, typed_in(context) & options.keys(), recipe)
    if dry_run:
        from anybatch.lab.dry_run import dry_run as try_out

        raise typer.Exit(try_out(config, Console(highlight=False), recipe))
    raise typer.Exit(terminal.train(config, out, resume, save_every, sys.argv[1:], Console(highlight=False)))


def _configured(options: dict[str, Any], typed: set[str], recipe: Path | None) -> "TrainConfig":
    """The options, or a recipe for a classifier with what was typed going before it."""
    from anybatch.lab.config import ClassifyConfig

    if recipe is None:
        return ClassifyConfig(**options)
    from anybatch.lab.recipes import read_recipe
    from anybatch.lab.tasks import config_class_of

    read = read_recipe(recipe)
    if not read.task.startswith("classify"):
        raise AnybatchError(f"recipe {read.path} is for the task '{read.task}': give it to anybatch {read.task}")
    config_class = config_class_of(read.task)
    names = {each.name for each in fields(config_class)}
    if strange := sorted(typed - names):
        option = strange[0].replace("_", "-")
        raise AnybatchError(
            f"--{option} is for images in memory, and recipe {read.path} trains from files: leave it out"
        )
    return config_class(**{**read.values, **{name: options[name] for name in typed}})


@app.command()
def weigh(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of 'anybatch train'.")],
) -> None:
    """Tune example weighing for a trained network: alpha picked on half of the test images, judged on the rest."""
    from anybatch.lab import terminal

    terminal.weigh(checkpoint, Console(highlight=False))
