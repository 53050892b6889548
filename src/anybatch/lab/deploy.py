"""The command export: a checkpoint folder to a file, and what is said of it."""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from anybatch.lab import machine
from anybatch.lab.export import Exported, export
from anybatch.lab.export_formats import FORMATS
from anybatch.lab.trained import open_trained

__all__ = ["deploy", "how_to_run"]


def deploy(
    folder: Path, format: str, out: Path | None, opset: int | None, fixed_batch: bool, part: str, console: Console
) -> None:
    """Exports the model of a checkpoint folder, and prints what was written and how to run it.

    Args:
        folder: of train, detect or segment.
        format: see `export`.
        out: the file; None: 'deploy' and the format's suffix, in the folder.
        opset: see `export`.
        fixed_batch: export for as many examples as evaluation gives at once in its example: one.
        part: see `export`.
        console: to print on.

    Raises:
        AnybatchError: there is no checkpoint, or what `export` raises.
    """
    task, model = open_trained(folder, "cpu")  # which every machine has, where it was trained or not
    facts = {"anybatch": machine.anybatch_version(), "norm": task.norm(), "config": json.dumps(task.config.record())}
    suffix = FORMATS[format].suffix if format in FORMATS else ""
    done = export(model, task.example(), out or folder / f"deploy{suffix}", format, opset, not fixed_batch, part, facts)
    kind = f"ONNX, opset {done.opset}" if done.opset else done.format
    unit = "tensors" if format == "safetensors" else "operations"
    batch = "any number of examples" if done.any_batch or format == "safetensors" else "as many examples as below"
    console.print(
        f"Wrote [bold]{escape(str(done.path))}[/]: {kind}, {done.nodes} {unit}, {done.size / 1e6:.2f} MB, {batch}",
        soft_wrap=True,
    )
    run_by = {"onnx": "in onnxruntime", "torch-export": "loaded again", "safetensors": "loaded again"}[format]
    console.print(
        f"Checked: {run_by}, on {' and '.join(done.checked)}, it differs from the trained model by at most "
        f"{done.difference:.1e} of the largest output",
        soft_wrap=True,
    )
    kept = "; it has no norm any more" if not done.left else f", {len(done.left)} stay:"
    console.print(f"Norms: {done.folded} folded into the maps before them{kept}")
    for reason in dict.fromkeys(done.left.values()):
        names = [name for name, why in done.left.items() if why == reason]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        console.print(f"  {escape(', '.join(names[:4]))}{more}: {escape(reason)}", soft_wrap=True)
    console.print("To run it:")
    for line in how_to_run(done, task.norm()):
        console.print(f"  {escape(line)}", soft_wrap=True)


def how_to_run(done: Exported, norm: str) -> list[str]:
    """Lines of Python that load an exported file and run it."""
    shapes = [f"({', '.join(['N' if done.any_batch else str(s[0]), *map(str, s[1:])])})" for s in done.inputs if s]
    takes = f"# float32, {' and '.join(shapes)}"
    if done.format == "onnx":
        names = ["input"] if len(done.inputs) == 1 else [f"input_{i}" for i in range(len(done.inputs))]
        given = ", ".join(f'"{name}": {name}' for name in names)
        return [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({str(done.path)!r})",
            f"outputs = session.run(None, {{{given}}})  {takes}, as numpy arrays",
        ]
    if done.format == "torch-export":
        return [
            "import torch",
            f"model = torch.export.load({str(done.path)!r}).module()",
            f"outputs = model(input)  {takes}",
        ]
    lines = ["import anybatch as ab, safetensors.torch"]
    if done.left:
        lines.append(f"# model is the network with the norms that it was trained with, {norm}")
    if done.thawed:
        lines.append("anybatch.integrations.frozen.thaw_(model)  # its frozen BatchNorms are folded too")
    if done.folded:
        strict = ", strict=False" if done.left else ""
        lines.append(f"model = ab.fold(model.eval(), input{strict})  # then the maps have a bias; input is {takes[2:]}")
    return [*lines, f"model.load_state_dict(safetensors.torch.load_file({str(done.path)!r}))"]
