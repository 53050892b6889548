"""Modules at work: what each is given and gives, in order."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..convert.eligible import batch_norms
from ..convert.tracing import MAP_FUNCTIONS, first_tensor, tensors_in
from ..core.linear_map import MAPS, LinearMap
from ..errors import AnybatchError

__all__ = ["as_channels", "first_not_finite", "linear", "maps_of", "middle", "norms_of", "refuse_unknown", "watching"]

See = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map (convolution, transposed convolution, Linear) by name.

    Raises:
        AnybatchError: there is none.
    """
    maps = {name: module for name, module in model.named_modules() if LinearMap.of(module) is not None}
    if not maps:
        raise AnybatchError(f"diagnose: {type(model).__name__} has no convolution and no Linear to look at")
    return maps


def refuse_unknown(names: Iterable[str], maps: Mapping[str, nn.Module]) -> None:
    """Refuse names of linear maps that the model has not.

    Raises:
        AnybatchError: naming the first, and some that there are.
    """
    for name in names:
        if name not in maps:
            raise AnybatchError(f"diagnose: there is no linear map '{name}'; there are {', '.join(list(maps)[:8])}")


def norms_of(model: nn.Module, call: str = "diagnose") -> dict[str, _BatchNorm]:
    """The norms of BatchNorm's family by name.

    Raises:
        AnybatchError: there is none.
    """
    norms = batch_norms(model)
    if not norms:
        kinds = {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()}
        raise AnybatchError(
            f"{call}: the model has no BatchNorm, so no batch statistics to look at; it has "
            f"{', '.join(sorted(kinds)) or 'no norm of any kind'}"
        )
    return norms


def middle(model: nn.Module) -> str:
    """The name of the convolution in the middle, of the map where there is no convolution."""
    maps = maps_of(model)
    convolutions = [name for name, module in maps.items() if not isinstance(module, nn.Linear)]
    names = convolutions or list(maps)
    return names[len(names) // 2]


def as_channels(module: nn.Module, y: Tensor) -> Tensor:
    """What a map put out as (N, C, *): Linear has its channels last."""
    return y.reshape(-1, y.shape[-1]) if isinstance(module, nn.Linear) else y


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """What the map alone makes of x, whatever else its own forward does."""
    kind: Any = next(base for base in type(module).__mro__ if base in MAPS)
    y: Tensor = kind.forward(module, x)
    return y


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call ``see(name, module, input, output)`` after every call of the modules on a tensor; what it gives back counts.

    The output of a map is what its convolution or product gave, whatever its forward does besides (a norm inside it).
    """
    inside = _Inside(see)

    def starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside.inputs[module] = first_tensor(args, kwargs)

    def hook(name: str) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            x = first_tensor(args, kwargs)
            return see(name, module, x, output) if x is not None and isinstance(output, Tensor) else None

        return after

    with ExitStack() as hooks:
        for name, module in modules.items():
            if isinstance(module, MAPS) and not any(type(module).forward is kind.forward for kind in MAPS):
                inside.names[module] = name
                hooks.callback(module.register_forward_pre_hook(starts, with_kwargs=True).remove)
            else:
                hooks.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        if inside.names:
            hooks.enter_context(inside)
        yield


class _Inside(TorchFunctionMode):
    """Sees the map inside of modules whose forward does more, by its weight."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see
        self.names: dict[nn.Module, str] = {}
        self.inputs: dict[nn.Module, Tensor | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in MAP_FUNCTIONS and isinstance(result, Tensor):
            given = {id(t) for t in tensors_in((args, kwargs or {}))}
            for module, x in self.inputs.items():
                if id(module._parameters.get("weight")) in given and x is not None:
                    replaced = self.see(self.names[module], module, x, result)
                    return result if replaced is None else replaced
        return result


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """While the body runs the model: a list that gets the first module whose output is not finite, in words."""
    found: list[str] = []

    def bad(value: Any) -> bool:
        return any(t.is_floating_point() and not t.detach().isfinite().all() for t in tensors_in(value))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if found or not bad(output):
                return
            own = [key for key, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
            why = (
                f"its {own[0]} is not finite"
                if own
                else "its input is not"
                if bad((args, kwargs))
                else "its input is finite"
            )
            found.append(f"the output of '{name}' ({type(module).__name__}; {why})")

        return after

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield found
