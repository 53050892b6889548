"""The command line: parsing only; the work is in `anybatch.lab`."""

import shlex
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from anybatch.errors import AnybatchError

if missing := [
    name for name in ("typer", "rich", "matplotlib", "jinja2", "numpy", "PIL", "safetensors") if not find_spec(name)
]:
    sys.stderr.write(f"Error: the command line needs {', '.join(missing)}: pip install 'anybatch[lab]'\n")
    raise SystemExit(2)

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

__all__ = ["app"]

# The lab is imported by the commands, not here: --help and --version need none of it.


class _Commands(TyperGroup):
    """Turns what a user can mend into one line and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AnybatchError as error:
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted.")
            raise typer.Exit(130) from None


class Mode(StrEnum):
    """How gradients of micro-batches become steps."""

    accumulate = "accumulate"
    step = "step"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Normalization that keeps its accuracy at any batch size: the experiments.",
)

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


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"anybatch {version('anybatch')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Normalization that keeps its accuracy at any batch size: the experiments."""


@app.command()
def compare(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="As for train; repeat for several; 'all' for the whole table. "
            "A quoted fraction, as in \"cbn-paper(burn_in_steps='1/3')\", "
            "is that share of the training forwards.",
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
    lr: LearningRate = 0.1,
    mode: GradientMode = Mode.accumulate,
    device: Device = "cpu",
    norm_weight_decay: NormWeightDecay = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one a core")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and report.")] = Path("results/compare"),
    quick: Annotated[bool, typer.Option("--quick", help="Few runs on few images: minutes, for a first look.")] = False,
) -> None:
    """Compare methods over batch sizes and seeds, against BatchNorm at batch 32; writes a report.

    Finished runs are kept: the same command goes on where it was stopped, and a larger one does only what is new.
    """
    from anybatch.lab import compare as lab
    from anybatch.lab import terminal
    from anybatch.lab.config import RunConfig
    from anybatch.lab.data import BUILT_IN

    preset = lab.QUICK if quick else lab.FULL
    base = RunConfig(
        data=data,
        train_images=preset.train_images if train_images is None and data in BUILT_IN else train_images,
        test_images=test_images,
        image_size=image_size,
        network=network,
        epochs=epochs or preset.epochs,
        lr=lr,
        mode=mode.value,
        device=device,
        norm_weight_decay=norm_weight_decay,
    )
    configs = lab.plan(base, method or preset.methods, batch or preset.batches, seeds or preset.seeds)
    command = shlex.join(["anybatch", *sys.argv[1:]])
    raise typer.Exit(terminal.compare(configs, out, jobs, command, Console(highlight=False)))


@app.command()
def train(
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
    lr: LearningRate = 0.1,
    mode: GradientMode = Mode.accumulate,
    device: Device = "cpu",
    norm_weight_decay: NormWeightDecay = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Save after so many steps, too.", show_default="after every epoch")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out, exactly as if never stopped.")] = False,
) -> None:
    """Train one network with one method; saves a checkpoint after every epoch, and when it is asked to stop.

    Ctrl-C and SIGTERM let the step end; a second Ctrl-C does not.
    On several devices: torchrun --nproc-per-node 2 -m anybatch train ...
    """
    from anybatch.lab import terminal
    from anybatch.lab.config import RunConfig

    config = RunConfig(
        method=method,
        batch=batch,
        seed=seed,
        data=data,
        train_images=train_images,
        test_images=test_images,
        image_size=image_size,
        network=network,
        epochs=epochs,
        lr=lr,
        mode=mode.value,
        device=device,
        norm_weight_decay=norm_weight_decay,
    )
    raise typer.Exit(terminal.train(config, out, resume, save_every, sys.argv[1:], Console(highlight=False)))


@app.command()
def weigh(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of 'anybatch train'.")],
) -> None:
    """Tune example weighing for a trained network: alpha picked on half of the test images, judged on the rest."""
    from anybatch.lab import terminal

    terminal.weigh(checkpoint, Console(highlight=False))


@app.command()
def bench(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="As for train; repeat for several. Besides: 'released', CBN the way of its authors, and 'syncbn'.",
            show_default="all",
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(help="'step', of training; 'layer', a 3x3 convolution and its norm; 'inference', folded too."),
    ] = "step",
    network: Network = "resnet18",
    channels: Annotated[int, typer.Option(help="Of the layer.")] = 64,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side.", show_default="64")] = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 4,
    sweep: Annotated[
        str | None,
        typer.Option(help="Repeat over a setting, and draw it: 'window=2,8,32', 'batch=1,2,4', 'image-size=64,128'."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Steps timed of every method.", show_default="15")] = None,
    threads: Annotated[int, typer.Option(help="That the processor works with.")] = 1,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="'float32', or autocast to 'bfloat16' or 'float16'.")] = "float32",
    format: Annotated[str, typer.Option(help="Of images and weights: 'contiguous' or 'channels_last'.")] = "contiguous",
    compile: Annotated[bool, typer.Option("--compile", help="Time every method compiled too, in one graph.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Time every method as a CUDA graph too; on CUDA.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.jsonl and figures; earlier timings in it stay.")] = Path(
        "results/bench"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="5 rounds on images of 32 pixels, for a first look.")] = False,
) -> None:
    """Time each method against BatchNorm, all in one process, and measure the memory it takes.

    A method is timed only if its first steps agree with float64's.
    """
    from anybatch.lab.bench import BenchConfig, Sweep
    from anybatch.lab.bench.show import run

    config = BenchConfig(
        methods=tuple(method or ["all"]),
        what=what,
        network=network,
        channels=channels,
        image_size=(32 if quick else 64) if image_size is None else image_size,
        batch=batch,
        rounds=(5 if quick else 15) if rounds is None else rounds,
        threads=threads,
        device=device,
        dtype=dtype,
        format=format,
        compile=compile,
        cuda_graphs=cuda_graphs,
    )
    over = Sweep.parse(sweep) if sweep else None
    command = shlex.join(["anybatch", *sys.argv[1:]])
    raise typer.Exit(run(config, over, out, command, Console(highlight=False)))


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


@app.command()
def diagnose(
    experiment: Annotated[
        list[str] | None,
        typer.Option(
            "--experiment",
            "--experiments",
            help="Repeat for several: depth, step-size, diverging-step, learning-rate, weight-gradients, "
            "logit-gradients, cancellation, gradient-noise, gaussian-products, batch-noise, evaluation-gap, "
            "history-error.",
            show_default="all",
        ),
    ] = None,
    data: Data = "embedded",
    image_size: ImageSize = 64,
    network: Network = "small-resnet",
    model: Model = None,
    method: Annotated[str, typer.Option(help="Convert the network's BatchNorms to this first.")] = "bn",
    checkpoint: Checkpoint = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Images of a batch.")] = 32,
    batches: Batches = 8,
    compare: Annotated[bool, typer.Option(help="Measure the network without its norms as well.")] = True,
    lr: TrainingRate = 0.1,
    micro_batches: MicroBatches = 1,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.html and diagnosis.json.")] = Path("results/diagnose"),
) -> None:
    """See what normalization does for a model on its data, and where it fails: the experiments of
    "Understanding Batch Normalization", and what a small batch does to batch statistics.
    """
    from anybatch.lab.diagnosing import Case, run_diagnosis

    case = Case(data, image_size, network, model, method, checkpoint, batch, batches, device)
    command = shlex.join(["anybatch", *sys.argv[1:]])
    run_diagnosis(case, experiment, compare, lr, micro_batches, out, command, Console(highlight=False))


@app.command()
def advise(
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Images a norm shall see at once.")],
    micro_batches: MicroBatches = 1,
    folds: Annotated[
        bool, typer.Option("--folds/--any", help="Advise only what folds into the convolutions at inference.")
    ] = True,
    data: Data = "embedded",
    image_size: ImageSize = 64,
    network: Network = "small-resnet",
    model: Model = None,
    checkpoint: Checkpoint = None,
    batches: Batches = 8,
    lr: TrainingRate = 0.1,
    device: Device = "cpu",
) -> None:
    """Say which normalization to train a model with at a batch size, and by what evidence."""
    from anybatch.lab.diagnosing import Case, run_advice

    case = Case(data, image_size, network, model, "bn", checkpoint, 32, batches, device)
    run_advice(case, batch_size, micro_batches, folds, lr, Console(highlight=False))


@app.command()
def methods() -> None:
    """List the methods."""
    from anybatch.methods import METHODS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("Method", "What it does", "Folds", "Map", "Alone"):
        table.add_column(column)
    for row in METHODS.values():
        flags = ("yes" if flag else "–" for flag in (row.foldable, row.needs_map, row.per_example))
        what = f"{escape(row.summary)} [dim]({escape(row.source)})[/]"
        table.add_row(f"[bold]{escape(row.name)}[/]", what, *flags)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\n[dim]Folds: at inference, into the convolution before it. Map: needs to know that convolution. "
        "Alone: normalises every example by itself.[/]"
    )


if __name__ == "__main__":
    app()
