"""What becomes of each norm's output: the activation that takes it, or the residual sum that it projects a shortcut to.

The model runs once on example inputs; every function on tensors becomes a node of a graph, in order of time. Nodes hold
no tensors, so the run keeps no activation alive.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..core.tensors import function_name, version
from ..layers.fused import fused_class
from ..layers.surroundings import ACTIVATIONS
from .pairing import as_call
from .snapshot import run_example, untouched
from .tracing import MAP_FUNCTIONS, READS, first_tensor, tensors_in

__all__ = ["Flow"]

_SUMS = {"add", "iadd", "radd"}
_MAPS = {name.strip("_") for name in MAP_FUNCTIONS}
_READS = {name.strip("_") for name in READS}


@dataclass(eq=False)
class _Node:
    """A function of the run, a norm among them, or a tensor that no function of the run made."""

    name: str
    inputs: list["_Node"] = field(default_factory=list)
    users: list["_Node"] = field(default_factory=list)
    is_norm: bool = False


class Flow(TorchFunctionMode):
    """One example run of a model; afterwards ``called``, ``activation_of``, ``is_shortcut`` answer for its norms.

    The model, its buffers and the random states are as before, also on an error.

    Args:
        model: run once without gradients, in the mode it is in; its norms evaluate.
        norms: those to ask about.
        example_inputs: see ``as_call``; one example is enough.

    Raises:
        AnybatchError: the model raises on the example inputs.
    """

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module], example_inputs: Any) -> None:
        super().__init__()
        self.called: set[nn.Module] = set()
        self._calls: dict[nn.Module, list[_Node]] = {norm: [] for norm in norms}
        self._order: list[_Node] = []
        self._nodes: MutableMapping[Tensor, _Node] = WeakIdKeyDictionary()
        self._running: list[tuple[nn.Module, Tensor | None]] = []  # norms, and what they normalise
        args, kwargs = as_call(example_inputs)
        with untouched(model), ExitStack() as hooks:
            for norm in self._calls:
                hooks.callback(norm.register_forward_pre_hook(self._norm_starts, with_kwargs=True).remove)
                if fused_class(norm) is not None:  # done before its activation
                    pass_on = partial(self._tail_starts, norm)
                    hooks.callback(norm.get_submodule("drop").register_forward_pre_hook(pass_on).remove)
                hooks.callback(norm.register_forward_hook(self._norm_ends, always_call=True).remove)
            output = run_example(model, self, args, kwargs)
            self._add("the model's output", list(tensors_in(output)))

    def activation_of(self, norm: nn.Module) -> str:
        """The elementwise function that alone takes the norm's output, the same in all of its calls; '' for none."""
        taken = {tuple(user.name for user in call.users) for call in self._calls[norm]}
        name = taken.pop()[0] if len(taken) == 1 and all(len(names) == 1 for names in taken) else ""
        return name if name in ACTIVATIONS else ""

    def is_shortcut(self, norm: nn.Module) -> bool:
        """Whether the norm, fed by one map, closes a residual block whose other branch has more maps."""
        calls = self._calls[norm]
        return bool(calls) and all(any(self._closes(call, user) for user in call.users) for call in calls)

    def _closes(self, call: _Node, total: _Node) -> bool:
        """Whether ``total`` sums the norm's output with a longer branch of what feeds the norm's map.

        What lies on that branch must have no user after the sum: in a feature pyramid, which adds levels, it has.
        """
        others = [node for node in total.inputs if node is not call]
        if total.name not in _SUMS or len(others) != 1 or not call.inputs or call.inputs[0].name not in _MAPS:
            return False
        above = _ancestors(others[0])
        start = call.inputs[0].inputs[0]
        while start not in above:  # the shortcut may pool or pad before its map
            if start.name in _MAPS or start.is_norm or not start.inputs:
                return False
            start = start.inputs[0]
        maps = {start: 0}  # what descends from the start, and by how many maps at most
        deep = False
        for node in self._order:
            lengths = [maps[source] for source in node.inputs if source in maps]
            if node is total:
                deep = maps[others[0]] > 1
                del maps[start]
            elif lengths and start not in maps:
                return False
            elif lengths:
                maps[node] = max(lengths) + (node.name in _MAPS)
        return deep

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._running:
            return func(*args, **(kwargs or {}))
        given = list(tensors_in((args, kwargs or {})))
        versions = {id(t): version(t) for t in given}
        result = func(*args, **(kwargs or {}))
        name = function_name(func)
        made = [t for t in tensors_in(result) if versions.get(id(t)) != version(t)]  # anew or in place
        if name == "setitem":
            made = given[:1]
        if made or name in _READS:
            node = self._add(name, given)
            for tensor in made:
                self._nodes[tensor] = node
        return result

    def _add(self, name: str, given: Iterable[Tensor], is_norm: bool = False) -> _Node:
        node = _Node(name, [self._node_of(tensor) for tensor in given], is_norm=is_norm)
        for source in dict.fromkeys(node.inputs):
            source.users.append(node)
        self._order.append(node)
        return node

    def _node_of(self, tensor: Tensor) -> _Node:
        return self._nodes.setdefault(tensor, _Node("given"))

    def _norm_starts(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called.add(norm)
        self._running.append((norm, first_tensor(args, kwargs)))

    def _tail_starts(self, norm: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return self._norm_ends(norm, (), args[0])

    def _norm_ends(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._running or self._running[-1][0] is not norm:
            return None
        y = self._running.pop()[1]
        if self._running or not isinstance(output, Tensor):
            return None
        node = self._add("norm", [] if y is None else [y], is_norm=True)
        self._calls[norm].append(node)
        # A layer of this library may have meant its output for the activation of an earlier conversion.
        plain = output if type(output) is Tensor else output.as_subclass(Tensor)
        self._nodes[plain] = node
        return plain


def _ancestors(node: _Node) -> set[_Node]:
    """The node and all that it was made of."""
    seen, rest = {node}, [node]
    while rest:
        new = [source for source in rest.pop().inputs if source not in seen]
        seen.update(new)
        rest += new
    return seen
