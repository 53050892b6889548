"""How a layer gets behind the activation that follows it, without any change to the model's code.

The layer hands out its output as a tensor of a private subclass. It looks like any other until the activation is called
on it, as a function, method or module, in place or not; then the layer says what comes out. Any other computation on it
is refused: the layer would be left half done.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.tensors import function_name, version
from ..errors import AnybatchError

__all__ = ["Activates", "Activation", "await_activation"]

# Functions that give a tensor to look at, without a gradient.
_LOOKS = {"detach", "data", "grad"}
# Functions of torch that its compiler does not hand to a subclass of tensor (2.13): they would go by unnoticed.
_UNSEEN_BY_THE_COMPILER = {"hardswish", "hardsigmoid"}


class Activation(NamedTuple):
    """An elementwise function as the model called it."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]  # those after the input
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        """The same function of ``x``, its parameters in the dtype of ``x``."""

        def fit(t: Tensor) -> Tensor:
            return t.to(x.dtype) if t.is_floating_point() else t

        args, kwargs = tree_map_only(Tensor, fit, (self.args, self.kwargs))
        return self.func(x, *args, **kwargs)


class Activates(Protocol):
    """A layer that goes on behind its activation."""

    activation: str

    def activated(self, out: Tensor, activation: Activation) -> Tensor:
        """What shall come out where the activation of the layer's output is ``out``."""


def await_activation(u: Tensor, layer: Activates) -> Tensor:
    """``u`` itself, to be given to the activation of ``layer``; no one else may have it yet."""
    if torch.compiler.is_dynamo_compiling():
        if layer.activation in _UNSEEN_BY_THE_COMPILER:
            from torch._dynamo.comptime import comptime

            comptime(_refuse)  # an error raised here would only break the graph, and go unnoticed in its next part
        out = u.as_subclass(_Awaiting)
    else:
        out = cast("_Awaiting", u)
        # as_subclass would make a view, which a checkpoint does not let be changed in place
        out.__class__ = _awaiting(type(u))
    out.layer = layer
    return out


def _refuse(context: Any) -> None:
    raise AnybatchError(
        "Proxy Norm: torch.compile and torch.export(strict=True) cannot follow its output into hardswish and "
        "hardsigmoid; leave this part of the model uncompiled (torch.compiler.disable), or export with strict=False"
    )


class _Awaiting(Tensor):
    """The output of a layer until the activation is called on it."""

    layer: Activates
    done: Tensor | None = None  # what came out of an activation in place: from then on this tensor means that

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The layer's word where ``func`` is the activation, torch's where it computes nothing, else an error."""
        if torch.compiler.is_dynamo_compiling():
            return _traced(func, args, kwargs or {})
        waiting: list[_Awaiting] = []

        def settle(u: _Awaiting) -> Tensor:
            if u.done is None:
                waiting.append(u)
            return u if u.done is None else u.done

        args, kwargs = tree_map_only(cls, settle, (tuple(args), dict(kwargs or {})))
        if not waiting:
            return func(*args, **kwargs)
        u, name = waiting[0], function_name(func)
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        with torch._C.DisableTorchFunctionSubclass():
            before = version(u)
            result = func(*args, **kwargs)
            if name == u.layer.activation and args[0] is u:
                plain = result.as_subclass(Tensor) if type(result) is _Awaiting else result
                out = u.layer.activated(plain, Activation(func, tuple(args[1:]), kwargs))
                u.done = out if result is u else None
                if u.done is not None and type(u) is not _Awaiting:
                    u.copy_(out)  # a graph has no done: whoever holds u gets what it was told last
                return out
            if name == "view_as":  # of a full backward hook on the norm
                return await_activation(result, u.layer)
            idle = result is u and version(u) == before  # dropout in evaluation, contiguous
            if idle or name in _LOOKS or not any(isinstance(t, Tensor) for t in tree_leaves(result)):
                return result
        raise _astray(u.layer, name)


@lru_cache
def _awaiting(kind: type[Tensor]) -> type[_Awaiting]:
    """What a tensor of ``kind`` becomes: torch.export runs a model on a subclass of its own, which it has to stay."""
    return _Awaiting if kind in (Tensor, _Awaiting) else type("_Awaiting", (_Awaiting, kind), {})


def _traced(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The same inside a compiled graph, which knows no tensor changed in place and follows plain calls only."""
    u = args[0] if args else kwargs["input"]
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if function_name(func) == u.layer.activation:
        rest = {k: v for k, v in kwargs.items() if k != "input"}
        return u.layer.activated(result, Activation(func, tuple(args[1:]), rest))
    if isinstance(result, Tensor):
        raise _astray(u.layer, function_name(func))
    return result


def _astray(layer: Activates, name: str) -> AnybatchError:
    return AnybatchError(
        f"{type(layer).__name__}: its output was to go to {layer.activation} and is given to {name}. Convert the model "
        "again with example inputs that show how it runs now; look at the output through .detach()"
    )
