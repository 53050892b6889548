"""The command that deploys: export."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anybatch.cli.app import app


class Format(StrEnum):
    """What an exported file is."""

    onnx = "onnx"
    torch_export = "torch-export"
    safetensors = "safetensors"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="--out folder of train, detect or segment.")],
    format: Annotated[Format, typer.Option(help="A graph, as ONNX or torch's .pt2; or the folded weights alone.")] = (
        Format.onnx
    ),
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="CHECKPOINT/deploy.*")] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 23.", show_default="18")] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="One example at a time, not any number of them.")
    ] = False,
    part: Annotated[
        str, typer.Option(help="A submodule alone, as the model calls it: 'backbone'.", show_default="the model")
    ] = "",
) -> None:
    """Write a trained model for deployment, its norms folded, and check the file against the model."""
    from anybatch.lab.deploy import deploy

    deploy(checkpoint, format.value, out, opset, fixed_batch, part, Console(highlight=False))
