"""Layers that a host builds one at a time, by the method's name, before there is a model around them.

A layer whose method has to know what feeds it waits: in training it refuses to run until :func:`pair_` has seen the
whole model. So nobody trains without the compensation that was asked for.
"""

import inspect
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert import Report, convert_
from ..errors import AnybatchError
from ..layers.base import TORCH_BATCH_NORMS
from ..layers.config import NormConfig
from ..methods import METHODS

__all__ = ["NAMES", "build", "pair_", "place", "waiting"]

# Torch's own norms a host has under names of its own.
NAMES: dict[str, type[NormConfig]] = {
    type(row.small).__name__: type(row.small) for row in METHODS.values() if row.name not in ("bn", "gn")
}
_OF_BATCH_NORM = [name for name in inspect.signature(nn.BatchNorm2d).parameters if name != "num_features"]


@dataclass(frozen=True)
class _Waits:
    """A forward pre-hook on a layer that is not paired yet, with what it is to be."""

    config: NormConfig

    def __call__(self, layer: nn.Module, args: Any) -> None:
        if layer.training:
            name = type(self.config).__name__
            raise AnybatchError(
                f"{name}: built before its model, it does not know yet what feeds it; once the model stands, call "
                "pair_(model, example_inputs) of the module in anybatch.integrations that built it"
            )


def build(name: str, num_features: int, dims: int = 0, **options: Any) -> nn.Module:
    """The layer of the method ``name``, new.

    Args:
        name: of the config, such as 'CBN'.
        num_features: C.
        dims: spatial dimensions of the input; 0: the first one settles it.
        options: torch's BatchNorm's (eps, momentum, affine, ...) and the config's own.

    Raises:
        AnybatchError: an option that neither has, a value out of range, or a method that has to know what follows the
            norm, which is asked of a whole model only.
    """
    make = NAMES[name]
    own = [field.name for field in fields(make)]  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in (*_OF_BATCH_NORM, *own)]:
        raise AnybatchError(
            f"{name}: no option {unknown[0]!r}; there are {', '.join(own)}, and BatchNorm's {', '.join(_OF_BATCH_NORM)}"
        )
    config = make(**{option: value for option, value in options.items() if option in own})
    torch_options = {option: value for option, value in options.items() if option not in own}
    return place(config, TORCH_BATCH_NORMS.get(dims, _BatchNorm)(num_features, **torch_options))


def place(config: NormConfig, norm: _BatchNorm) -> nn.Module:
    """The layer of ``config`` in the place of a new ``norm`` that is in no model yet; it waits if it has to.

    Raises:
        AnybatchError: the method has to know what follows the norm, which is asked of a whole model only.
    """
    if config.needs_flow:
        raise AnybatchError(
            f"{config!r} has to know what follows the norm, in evaluation too, and is not built by itself; build the "
            "model with BatchNorm and call convert_(model, config, example_inputs)"
        )
    layer = config.build(norm)
    if config.needs_map:
        layer.register_forward_pre_hook(_Waits(config))
    return layer


def waiting(model: nn.Module) -> dict[nn.Module, NormConfig]:
    """The layers that wait to be paired, and what they are to be."""
    hooks = ((layer, hook) for layer in model.modules() for hook in layer._forward_pre_hooks.values())
    return {layer: hook.config for layer, hook in hooks if isinstance(hook, _Waits)}


def pair_(model: nn.Module, example_inputs: Any) -> Report:
    """Let the layers that were built by name know what feeds each of them, in place; parameters stay the same objects.

    Args:
        model: whole, not wrapped or compiled yet.
        example_inputs: what one forward of the model takes, as for :func:`anybatch.convert_`.

    Returns:
        A row for every norm that waited.

    Raises:
        AnybatchError: no layer waits, or as :func:`anybatch.convert_` raises; the layers then wait on.
    """
    layers = waiting(model)
    if not layers:
        raise AnybatchError(
            f"pair_: no norm of the model waits to be paired; those built by name do, of {', '.join(NAMES)}. For any "
            "other model: convert_(model, config, example_inputs)"
        )
    rows = []
    for config in dict.fromkeys(layers.values()):
        group = [layer for layer, its in layers.items() if its == config]
        for layer in group:
            _stop_waiting(layer)
        try:
            report = convert_(model, config, example_inputs, where=partial(_is_of, group))
        except Exception:
            for layer in group:
                layer.register_forward_pre_hook(_Waits(config))
            raise
        rows += report.converted
    return Report(tuple(rows))


def _is_of(group: list[nn.Module], name: str, norm: nn.Module) -> bool:
    return norm in group


def _stop_waiting(layer: nn.Module) -> None:
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, _Waits):
            del layer._forward_pre_hooks[key]
