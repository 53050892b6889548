"""Commands that measure: bench, diagnose, advise; and methods, which lists."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anybatch.cli.app import app
from anybatch.cli.options import (
    Batches,
    Checkpoint,
    Data,
    Device,
    ImageSize,
    MicroBatches,
    Model,
    Network,
    TrainingRate,
)


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
