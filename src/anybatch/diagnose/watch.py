"""Modules at work: what each is given and gives, in order."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.eligible import batch_norms
from ..convert.tracing import first_tensor, tensors_in
from ..core.linear_map import LinearMap
from ..errors import AnybatchError

__all__ = ["as_channels", "first_not_finite", "maps_of", "middle", "norms_of", "watching"]

See = Callable[[str, nn.Module, Tensor, Tensor], None]


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map (convolution, transposed convolution, Linear) by name.

    Raises:
        AnybatchError: there is none.
    """
    maps = {name: module for name, module in model.named_modules() if LinearMap.of(module) is not None}
    if not maps:
        raise AnybatchError(f"diagnose: {type(model).__name__} has no convolution and no Linear to look at")
    return maps


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The norms of BatchNorm's family by name.

    Raises:
        AnybatchError: there is none.
    """
    norms = batch_norms(model)
    if not norms:
        kinds = {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()}
        raise AnybatchError(
            "diagnose: the model has no BatchNorm, so no batch statistics to look at; it has "
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


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call ``see(name, module, input, output)`` after every call of the modules on a tensor."""

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and isinstance(output, Tensor):
                see(name, module, x, output)

        return after

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """While the body runs the model: a list that gets the first module whose output is not finite, in words."""
    found: list[str] = []

    def bad(value: Any) -> bool:
        return any(t.is_floating_point() and not t.isfinite().all() for t in tensors_in(value))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if found or not bad(output):
                return
            own = [key for key, p in module.named_parameters(recurse=False) if not p.isfinite().all()]
            why = f"its {own[0]} is not finite" if own else "its input is not" if bad(args) else "its input is finite"
            found.append(f"the output of '{name}' ({type(module).__name__}; {why})")

        return after

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(hook(name)).remove)
        yield found
