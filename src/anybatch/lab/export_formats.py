"""The formats a deployed model is written in: each as bytes, and bytes read back as something that runs."""

import contextlib
import copy
import io
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from anybatch.errors import AnybatchError, first_line
from anybatch.integrations._hosts import require

__all__ = ["FORMATS", "OPSETS", "Args", "Runner", "Written", "norms_of_graph"]

OPSETS = range(18, 24)  # what torch's exporter has operators for; older ones it converts to, mostly in vain

Args = tuple[Any, ...]
Runner = Callable[[Args], list[Tensor]]

_ATEN_NORM = re.compile(r"(batch|instance|group|layer|rms)_norm")
_ONNX_NORM = re.compile(r"(Batch|Instance|Group|Layer|RMS|MeanVariance)Normalization")


@dataclass(frozen=True)
class Written:
    """A model in a format.

    Attributes:
        content: of the file.
        nodes: operations of the graph, or tensors where there is none.
        norms: operations that normalise, by the name of the module that calls them; none are known without a graph.
        kinds: how often each kind of them is in the file.
        reached: names of the modules that the graph goes through; None without a graph.
    """

    content: bytes
    nodes: int
    norms: Mapping[str, str]
    kinds: Mapping[str, int]
    reached: frozenset[str] | None


class _Write(Protocol):
    def __call__(
        self, model: nn.Module, args: Args, any_batch: bool, opset: int, facts: Mapping[str, str]
    ) -> Written: ...


class Format(NamedTuple):
    """How a format is written and read back.

    Attributes:
        suffix: of its files.
        needs: modules that the extra 'export' installs.
        write: see `Written`.
        read: from the content, and the model that it is of, to what gives the model's output tensors.
    """

    suffix: str
    needs: tuple[str, ...]
    write: _Write
    read: Callable[[bytes, nn.Module], Runner]


def norms_of_graph(program: torch.export.ExportedProgram) -> dict[str, str]:
    """The operations of a captured graph that normalise, by the name of the module that calls them."""
    return {_module_of(node): str(node.target) for node in _calls(program) if _ATEN_NORM.search(str(node.target))}


def _calls(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Every operation, those under another mode of autocast or of gradients included: they have graphs of their own."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return [node for node in calls if not isinstance(node.target, torch._ops.HigherOrderOperator)]


def _module_of(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _capture(model: nn.Module, args: Args, any_batch: bool) -> torch.export.ExportedProgram:
    """The graph of a model, for any length of the first dimension of its inputs or for that of ``args``."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in args) if any_batch else None
    said = io.StringIO()  # of a failure torch prints the graph as far as it came, thousands of lines
    try:
        with torch.no_grad(), contextlib.redirect_stderr(said):
            program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the model's own code raises on a tensor without values
        if isinstance(error, AnybatchError):
            raise
        mend = "; --fixed-batch (dynamic_batch=False) may" if any_batch else ""
        raise AnybatchError(
            f"torch.export cannot follow {type(model).__name__} ({_brief(error)}){mend}. What decides by values, "
            "as the choice among a detector's boxes does, cannot be in a graph: export the network inside of it by its "
            "name (part='backbone', --part backbone), or the folded weights alone (--format safetensors)"
        ) from error
    sys.stderr.write(said.getvalue())
    return program


def _written(program: torch.export.ExportedProgram, content: bytes, nodes: int, kinds: Mapping[str, int]) -> Written:
    stacks = [node.meta.get("nn_module_stack") or {} for node in _calls(program)]
    reached = frozenset(str(path) for stack in stacks for path, _ in stack.values())
    return Written(content, nodes, norms_of_graph(program), kinds, reached)


def _write_onnx(model: nn.Module, args: Args, any_batch: bool, opset: int, facts: Mapping[str, str]) -> Written:
    program = _capture(model, args, any_batch)
    count = len(tree_leaves(args))
    names = ["input"] if count == 1 else [f"input_{i}" for i in range(count)]
    try:
        with warnings.catch_warnings():
            # Of torch.onnx's own code, about torch's.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated", FutureWarning)
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=names, external_data=False, verbose=False
            )
        assert converted is not None
        proto = converted.model_proto
        for key, value in facts.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        content: bytes = proto.SerializeToString()
    except Exception as error:
        raise AnybatchError(
            f"{type(model).__name__} cannot be written as ONNX ({_brief(error)}): take --format torch-export"
        ) from error
    kinds = [node.op_type for node in proto.graph.node if _ONNX_NORM.fullmatch(node.op_type)]
    return _written(program, content, len(proto.graph.node), {kind: kinds.count(kind) for kind in sorted(set(kinds))})


def _read_onnx(content: bytes, model: nn.Module) -> Runner:
    onnxruntime = require("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(args: Args) -> list[Tensor]:
        given = [tensor.numpy() for tensor in tree_leaves(args)]
        names = [each.name for each in session.get_inputs()]
        return [torch.from_numpy(found) for found in session.run(None, dict(zip(names, given, strict=True)))]

    return run


def _write_program(model: nn.Module, args: Args, any_batch: bool, opset: int, facts: Mapping[str, str]) -> Written:
    program, buffer = _capture(model, args, any_batch), io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(facts))
    calls = [str(node.target) for node in _calls(program)]
    norms = [target for target in calls if _ATEN_NORM.search(target)]
    return _written(program, buffer.getvalue(), len(calls), {kind: norms.count(kind) for kind in sorted(set(norms))})


def _read_program(content: bytes, model: nn.Module) -> Runner:
    loaded = torch.export.load(io.BytesIO(content)).module()
    return lambda args: tree_leaves(loaded(*args))


def _write_state(model: nn.Module, args: Args, any_batch: bool, opset: int, facts: Mapping[str, str]) -> Written:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(state, {"format": "pt", **facts})
    return Written(content, len(state), {}, {}, None)


def _read_state(content: bytes, model: nn.Module) -> Runner:
    fresh = copy.deepcopy(model)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.data.zero_()  # what the file does not hold is then missed
    fresh.load_state_dict(safetensors.torch.load(content))
    return lambda args: tree_leaves(fresh(*args))


FORMATS: Mapping[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch-export": Format(".pt2", (), _write_program, _read_program),
    "safetensors": Format(".safetensors", (), _write_state, _read_state),
}


def _brief(error: Exception) -> str:
    return first_line(error).rstrip(".:")[:200]
