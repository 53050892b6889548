"""One example run of a model, watched: which tensor each norm was called on, what made it, and who else reads it.

Tensors are told apart by identity. Forward hooks see the maps and the norms, a TorchFunctionMode sees every other use
of a tensor, so control flow in the model is no obstacle.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..core.linear_map import LinearMap
from .closed_form import mismatch, scales_with_weight, unsteady
from .snapshot import run_example, untouched

__all__ = ["MAP_FUNCTIONS", "READS", "Call", "Ledger", "Trail", "Visit", "first_tensor", "tensors_in"]

# Functions that rearrange values without computing on them.
_REARRANGES = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("permute", "transpose", "movedim", "swapaxes", "swapdims", "t", "T", "mT", "chunk", "split", "unbind"),
    *("__getitem__", "contiguous", "detach", "clone", "to", "float", "half", "double"),
}
# Functions that give back their own argument when there is nothing to do.
_IDLE = {
    *("contiguous", "expand", "to", "float", "half", "double", "bfloat16", "type", "type_as", "cpu", "cuda"),
    "requires_grad_",
}
# Functions that read values though no tensor comes back.
READS = {"item", "tolist", "numpy", "__array__", "__setitem__", "equal", "allclose"}
# Functions that are what a map's forward calls.
MAP_FUNCTIONS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "__matmul__", "einsum"),
}


@dataclasses.dataclass
class Trail:
    """What is known of one tensor of the run. It holds no tensor, so the run keeps no activation alive."""

    made_by: str
    source: "Trail | None" = None  # of the tensor it rearranges
    call: "Call | None" = None  # the map that returned it
    readers: list[str] = dataclasses.field(default_factory=list)  # functions, other than the map's own and the norm's
    changed_by: list[str] = dataclasses.field(default_factory=list)  # functions that gave back the tensor itself


@dataclasses.dataclass
class Call:
    """One forward of a map."""

    map: nn.Module
    output: Trail | None = None  # where a norm sits inside the map: of the norm's input
    norms: list[nn.Module] = dataclasses.field(default_factory=list)  # that were called on the output


@dataclasses.dataclass(frozen=True)
class Visit:
    """One forward of a norm."""

    call: Call | None  # of the map that fed it, if one did
    inside: bool = False  # the norm ran inside the map's forward
    empty: bool = False  # on no values at all
    reason: str = ""  # why no map, or not this map, may be relied on
    scales: bool = False  # the norm can be folded into the map all the same


class Ledger(TorchFunctionMode):
    """Watches one run of a model; afterwards ``visits``, ``calls`` and ``borrowed`` say what happened.

    Args:
        model: whose maps are watched.
        norms: the norms to watch.
    """

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.visits: dict[nn.Module, list[Visit]] = {norm: [] for norm in norms}
        self.calls: list[Call] = []
        self.rows: dict[nn.Module, int] = {}  # norm -> the most rows that it was called on
        self.borrowed: dict[nn.Module, str] = {}  # map -> function that used its weight outside of its forward
        self.names = {module: name for name, module in model.named_modules()}
        self._model = model
        self._maps = [module for module in self.names if LinearMap.of(module) is not None]
        self._weights = {id(weight): module for module in self._maps for weight in module.parameters(recurse=False)}
        self._trails: MutableMapping[Tensor, Trail] = WeakIdKeyDictionary()
        self._inputs: MutableMapping[Tensor, Tensor | None] = (
            WeakIdKeyDictionary()
        )  # output of a map -> input of the map
        self._running: list[tuple[Call, Tensor | None]] = []
        self._normalising: list[Tensor | None] = []
        self._unsteady: set[nn.Module] = set()
        self._paused = False

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the model once in its own mode, its norms evaluating; afterwards it is as before, also on an error.

        Raises:
            AnybatchError: the model raises on these inputs, or has uninitialised lazy modules.
        """
        with untouched(self._model), ExitStack() as hooks:
            self._unsteady = {module for module in self._maps if unsteady(module)}
            for watched, starts, ends in (
                (self._maps, self._map_starts, self._map_ends),
                (self.visits, self._norm_starts, self._norm_ends),
            ):
                for module in watched:
                    hooks.callback(module.register_forward_pre_hook(starts, with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(ends).remove)
            for tensor in tensors_in((args, kwargs)):
                self._trails[tensor] = Trail("an input of the model")
            output = run_example(self._model, self, args, kwargs)
            for tensor in tensors_in(output):
                if trail := self._trails.get(tensor):
                    trail.readers.append("the model's output")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self._note(func, list(tensors_in((args, kwargs or {}))), list(tensors_in(result)))
        return result

    def _note(self, func: Callable[..., Any], given: list[Tensor], made: list[Tensor]) -> None:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property such as y.T
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if not made and name not in READS:
            return
        before, after = {id(t) for t in given}, {id(t) for t in made}
        for position, tensor in enumerate(given):
            owner = self._weights.get(id(tensor))
            if owner is not None and all(call.map is not owner for call, _ in self._running):
                self.borrowed[owner] = name
            trail = self._trails.get(tensor)
            if trail is None:
                continue
            if id(tensor) in after or (name == "__setitem__" and position == 0):
                if name not in _IDLE:
                    trail.changed_by.append(name)
            elif not any(tensor is y for y in self._normalising):
                trail.readers.append(name)
        source = self._trails.get(given[0]) if given and name in _REARRANGES else None
        for tensor in made:
            if id(tensor) not in before:
                self._trails[tensor] = Trail(name, source)

    def _map_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(Call(module))
        self._running.append((self.calls[-1], first_tensor(args, kwargs)))

    def _map_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, x = self._running.pop()
        while call.map is not module:  # a forward that raised, and whose error the model caught
            call, x = self._running.pop()
        if not isinstance(output, Tensor):
            return
        trail = self._trails.setdefault(output, Trail(type(module).__name__))
        if trail.call is not None or call.norms:  # made by a map within this one; or normalised already
            return
        trail.call, call.output, self._inputs[output] = call, trail, x
        trail.readers.clear()  # so far only the map's own code, and its hooks
        trail.changed_by.clear()

    def _norm_starts(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        y = first_tensor(args, kwargs)
        if y is not None and y.dim():
            self.rows[norm] = max(self.rows.get(norm, 0), len(y))
        self._normalising.append(y)
        self._paused = True
        self.visits[norm].append(
            Visit(None, reason="it was called on no tensor") if y is None else self._visit(norm, y)
        )
        self._paused = False

    def _norm_ends(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._normalising.pop()

    def _visit(self, norm: nn.Module, y: Tensor) -> Visit:
        trail = self._trails.setdefault(y, Trail("an operation out of sight"))
        inside = trail.call is None
        if trail.call is not None:
            call, x = trail.call, self._inputs.get(y)
        else:
            around = [entry for entry in self._running if norm in set(entry[0].map.modules())]
            if not around:
                return Visit(None, reason=self._unfed(trail))
            call, x = around[-1]
            call.output = trail
        call.norms.append(norm)
        scales = False
        if inside and call.map in self._unsteady:
            reason = "every reading of the weight of the map around it changes that weight (spectral_norm)"
        elif trail.changed_by and not inside:
            reason = f"{' and '.join(trail.changed_by)} stands between the map and it"
        elif x is None:
            reason = "the map was called on no tensor"
        else:
            reason = mismatch(call.map, x, y) if y.numel() else ""
            scales = bool(reason) and not inside and scales_with_weight(call.map, x, y)
        return Visit(call, inside, empty=not y.numel(), reason=reason, scales=scales)

    def _unfed(self, trail: Trail) -> str:
        hops, origin = [trail.made_by], trail.source
        while origin is not None and origin.call is None:
            hops.append(origin.made_by)
            origin = origin.source
        if origin is not None and origin.call is not None:
            return f"the output of '{self.names[origin.call.map]}' passes through {', '.join(reversed(hops))} before it"
        functional = " (a function called on its own: no module to follow)" if trail.made_by in MAP_FUNCTIONS else ""
        then = f", then {', '.join(dict.fromkeys(trail.changed_by))}" if trail.changed_by else ""
        return f"fed by no linear map: it normalises the result of {trail.made_by}{functional}{then}".replace(
            "the result of an ", "an "
        )


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor a module is called on."""
    given = args[0] if args else kwargs.get("input")
    return given if isinstance(given, Tensor) else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
