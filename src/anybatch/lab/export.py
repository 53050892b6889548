"""A trained model as a file for deployment: norms folded, written, read back, and held against the model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from anybatch.convert.eligible import batch_norms
from anybatch.errors import AnybatchError
from anybatch.inference.fold import fold, refusals
from anybatch.integrations._hosts import require
from anybatch.integrations.frozen import thaw_
from anybatch.lab.export_formats import FORMATS, OPSETS, Args, Format, Runner, Written
from anybatch.reporting.files import write_atomically

__all__ = ["DEFAULT_OPSET", "TOLERANCE", "Exported", "Stripped", "export", "strip"]

TOLERANCE = 1e-4  # of the largest output
DEFAULT_OPSET = OPSETS.start  # the most runtimes read it

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Exported:
    """What was written and how it was found.

    Attributes:
        format: one of `FORMATS`.
        opset: of ONNX; None for the others.
        any_batch: whether it takes any number of examples, or only as many as its example had.
        nodes: operations of the graph; of safetensors, tensors.
        folded: norms that are in no graph any more, their work done by the weights before them.
        thawed: of these, norms that were frozen BatchNorms (`anybatch.integrations.frozen`).
        left: why each norm that is still there is, by name.
        checked: on which inputs the file was held against the model.
        difference: the largest one found, as a share of the output's largest value.
        size: of the file, in bytes.
        inputs: shapes of what it takes, as it was checked last.
    """

    path: Path
    format: str
    opset: int | None
    any_batch: bool
    nodes: int
    folded: int
    thawed: int
    left: Mapping[str, str]
    checked: tuple[str, ...]
    difference: float
    size: int
    inputs: tuple[tuple[int, ...], ...]


class Stripped(NamedTuple):
    """A copy of a model for deployment.

    Attributes:
        model: in evaluation mode, on the CPU, every norm folded that can be.
        folded: names of these norms.
        thawed: of those that were frozen BatchNorms.
        left: why each other norm stays, by name.
    """

    model: nn.Module
    folded: tuple[str, ...]
    thawed: tuple[str, ...]
    left: Mapping[str, str]


def export(
    model: nn.Module,
    example: Any,
    path: Path,
    format: str = "onnx",
    opset: int | None = None,
    dynamic_batch: bool = True,
    part: str = "",
    facts: Mapping[str, str] | None = None,
) -> Exported:
    """Fold a copy of a trained model, write it, read the file back and compare; only what agrees is left on disk.

    Args:
        model: converted or not; it is left as it is.
        example: what one forward in evaluation takes, a tensor or a tuple of arguments; better real than random.
        path: the file; its folder is made.
        format: 'onnx', 'torch-export' (.pt2) or 'safetensors' (the folded state_dict).
        opset: of ONNX, 18 by default.
        dynamic_batch: let the graph take any number of examples, the first dimension of every argument. Arguments that
            are no tensors of one length, such as a detector's list of images, leave it fixed.
        part: name of a submodule to export alone, as the model calls it; '' for all.
        facts: further text to put into the file's metadata, by key.

    Returns:
        What was written; `left` names the norms that could not be folded.

    Raises:
        AnybatchError: there is no such format, opset or part, a package is missing, the model cannot be captured, a
            folded norm is still in the graph, the file's outputs differ from the model's by more than 1e-4 of their
            scale, or it cannot be written. Then there is no file.
    """
    chosen = _format(format, opset)
    if path.is_dir():
        raise AnybatchError(f"{path} is a folder: give a file, {path / ('model' + chosen.suffix)}")
    args = _on_cpu(example if isinstance(example, tuple) else (example,))
    reference = copy.deepcopy(model).cpu().eval()
    stripped, args = _part_of(strip(reference, args), args, part)
    any_batch = dynamic_batch and _length(args) is not None
    trials = _trials(args, any_batch)
    most = list(trials.values())[-1]
    written = chosen.write(stripped.model, most, any_batch, opset or DEFAULT_OPSET, dict(facts or {}))
    left = _norms_left(written, stripped)
    difference = _difference(reference.get_submodule(part), chosen.read(written.content, stripped.model), trials)
    if not difference <= TOLERANCE:
        hint = "export a part that holds every norm with the map before it" if part else "please report the model"
        raise AnybatchError(
            f"the {format} file gives other outputs than the model: they differ by {difference:.1e} of the largest "
            f"one, allowed are {TOLERANCE:.0e}; nothing was written: {hint}, or take another format"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, written.content)
    except OSError as error:
        raise AnybatchError(f"{path} cannot be written ({error.strerror or error}): name another file") from error
    return Exported(
        path=path,
        format=format,
        opset=(opset or DEFAULT_OPSET) if format == "onnx" else None,
        any_batch=any_batch,
        nodes=written.nodes,
        folded=len(stripped.folded),
        thawed=len(stripped.thawed),
        left=left,
        checked=tuple(trials),
        difference=difference,
        size=len(written.content),
        inputs=tuple(tuple(tensor.shape) for tensor in tree_leaves(args)),
    )


def strip(model: nn.Module, args: Args) -> Stripped:
    """Fold what can be folded in a copy of a model, frozen BatchNorms included.

    Args:
        model: in evaluation mode; it is left as it is.
        args: of one forward.

    Raises:
        AnybatchError: the model is wrapped, or raises on ``args``.
    """
    deployed = copy.deepcopy(model)
    frozen = any("FrozenBatchNorm" in type(module).__name__ for module in deployed.modules())
    thawed = thaw_(deployed) if frozen else ()
    reasons: dict[str, str] = {}
    if batch_norms(deployed):
        reasons = refusals(deployed, (args, {}))
        deployed = fold(deployed, (args, {}), strict=False)
    left = {
        name: reasons.get(name) or f"{type(module).__name__} normalises each example by its own moments"
        for name, module in deployed.named_modules()
        if isinstance(module, _NORMS)
    }
    return Stripped(deployed, tuple(name for name, reason in reasons.items() if not reason), thawed, left)


def _format(name: str, opset: int | None) -> Format:
    if name not in FORMATS:
        raise AnybatchError(f"there is no format '{name}': choose {', '.join(FORMATS)}")
    if opset is not None and name != "onnx":
        raise AnybatchError(f"opset {opset} is for onnx, {name} has none: leave it out")
    if opset is not None and opset not in OPSETS:
        raise AnybatchError(
            f"opset {opset} is not one that torch's exporter writes: give {OPSETS.start} to {OPSETS.stop - 1}"
        )
    for module in FORMATS[name].needs:
        require(module, "export")
    return FORMATS[name]


def _on_cpu(args: Args) -> Args:
    moved: Args = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), args)
    return moved


def _length(args: Args) -> int | None:
    """The examples in a batch, where every argument is a tensor of as many."""
    lengths = {len(a) if isinstance(a, Tensor) and a.dim() else None for a in args}
    return lengths.pop() if len(lengths) == 1 else None


def _part_of(stripped: Stripped, args: Args, name: str) -> tuple[Stripped, Args]:
    """A submodule alone, and the arguments that the model calls it with."""
    if not name:
        return stripped, args
    modules = dict(stripped.model.named_modules())
    if name not in modules:
        near = ", ".join(child for child, _ in stripped.model.named_children())
        raise AnybatchError(f"{type(stripped.model).__name__} has no part '{name}': it has {near}, and parts of these")
    calls: list[Args] = []

    def note(module: nn.Module, given: Args, by_name: dict[str, Any]) -> None:
        if by_name:
            raise AnybatchError(
                f"'{name}' is called with arguments by name ({', '.join(by_name)}): export another part"
            )
        calls.append(given)

    handle = modules[name].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        stripped.model(*args)
    handle.remove()
    if not calls:
        raise AnybatchError(f"the model does not call '{name}' in evaluation: export another part")
    inside = f"{name}."
    folded, thawed = (
        tuple(norm.removeprefix(inside) for norm in norms if norm.startswith(inside))
        for norms in (stripped.folded, stripped.thawed)
    )
    left = {norm.removeprefix(inside): why for norm, why in stripped.left.items() if norm.startswith(inside)}
    return Stripped(modules[name], folded, thawed, left), _on_cpu(calls[0])


def _trials(args: Args, any_batch: bool) -> dict[str, Args]:
    """Inputs to compare on: the example, others made of it, and noise of its mean and spread."""
    if _length(args) is None:  # a detector's: in noise it finds boxes of equal scores, which rounding puts in any order
        return {"a real example": args}
    if not any_batch:
        return {"noise": _noise(args), "a real example": args}
    one: Args = tuple(tensor[:1] for tensor in args)
    three: Args = tuple(_three(tensor) for tensor in one)
    return {
        "noise": _noise(one),
        "a real example": one,
        "noise at batch 3": _noise(three),
        "real examples at batch 3": three,
    }


def _three(tensor: Tensor) -> Tensor:
    """The example, its mirror image, and it again at half the contrast: whoever mixes examples up is found out."""
    return torch.cat([tensor, tensor.flip(-1), tensor / 2 if tensor.is_floating_point() else tensor])


def _noise(args: Args) -> Args:
    generator = torch.Generator().manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        spread = tensor.std(correction=0) or 1.0
        return tensor.mean() + spread * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    noise: Args = tree_map_only(Tensor, like, args)
    return noise


def _norms_left(written: Written, stripped: Stripped) -> dict[str, str]:
    """The norms that the file still has, and why.

    Raises:
        AnybatchError: one of them was folded.
    """
    if again := [name for name in stripped.folded if name in written.norms]:
        raise AnybatchError(
            f"'{again[0]}' was folded, and {written.norms[again[0]]} is in the graph all the same ({len(again)} such "
            "norms); nothing was written: please report the model"
        )
    reached = written.reached
    left = {name: why for name, why in stripped.left.items() if reached is None or name in reached}
    left |= {name: f"{op} in the forward of its own" for name, op in written.norms.items() if name not in left}
    if written.kinds and not left:
        raise AnybatchError(f"{written.kinds} in the file, of no norm of the model; nothing was written")
    return left


@torch.no_grad()
def _difference(model: nn.Module, run: Runner, trials: Mapping[str, Args]) -> float:
    """The largest difference of outputs, as a share of the largest value of that output; inf where shapes differ."""
    worst = 0.0
    for name, args in trials.items():
        # Either may write to what it is given.
        wanted = [t for t in tree_leaves(model(*copy.deepcopy(args))) if isinstance(t, Tensor)]
        found = run(copy.deepcopy(args))
        if [t.shape for t in wanted] != [t.shape for t in found]:
            return float("inf")
        for theirs, ours in zip(wanted, found, strict=True):
            if not theirs.isfinite().all():
                raise AnybatchError(f"the model's output on {name} is not finite: there is nothing to deploy")
            scale = theirs.double().abs().max().clamp_min(1e-30) if theirs.numel() else 1.0
            gap = (theirs.double() - ours.double()).abs() / scale
            worst = max(worst, float(gap.nan_to_num(float("inf")).max()) if gap.numel() else 0.0)
    return worst
