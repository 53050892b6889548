"""Frozen BatchNorms, as detectors keep them in a pretrained backbone, taken back to torch's BatchNorm.

torchvision, timm, detectron2 and nearly every detector in transformers have a class of their own for it: buffers
instead of parameters, and no BatchNorm to an isinstance check. They are told by what they hold.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.eligible import Where, matches, refuse_wrapped
from ..convert.walker import share_hooks, swap
from ..errors import AnybatchError
from ._hosts import require

__all__ = ["thaw_"]

_HELD = ("weight", "bias", "running_mean", "running_var")
_EPS = 1e-5  # of the classes in transformers, which write it into their forward


def thaw_(model: nn.Module, where: Where = None) -> tuple[str, ...]:
    """Turn frozen BatchNorms into torch's, in place: evaluation stays, and ``convert_`` can replace them.

    Weight and bias become parameters, which train, so build the optimizer afterwards; running statistics stay as they
    are. Names in the state_dict stay, ``num_batches_tracked`` comes along.

    Args:
        model: not wrapped or compiled.
        where: which of them: a function of (name, module), or glob patterns on names; all by default.

    Returns:
        The names of the norms that were thawed, in the model's order.

    Raises:
        AnybatchError: the model has no frozen BatchNorm, ``where`` matches none, one does not compute what its
            BatchNorm would, or the model is wrapped or itself one. Then nothing is changed.
    """
    refuse_wrapped("thaw_", model)
    found = {name: module for name, module in model.named_modules() if _is_frozen(module)}
    if not found:
        raise AnybatchError("thaw_: the model has no frozen BatchNorm")
    if "" in found:
        raise AnybatchError(
            "thaw_: the model itself is a frozen BatchNorm, which cannot be replaced in place; wrap it in nn.Sequential"
        )
    chosen = {name: module for name, module in found.items() if matches(where, name, module)}
    if not chosen:
        shown = ", ".join(list(found)[:5])
        raise AnybatchError(
            f"thaw_: where={where!r} matches none of the {len(found)} frozen BatchNorms; there are {shown}"
        )
    thawed: dict[nn.Module, nn.Module] = {module: _thawed(name, module) for name, module in chosen.items()}
    for old, new in thawed.items():
        share_hooks(old, new)
    swap(model, thawed)
    return tuple(chosen)


def _is_frozen(module: nn.Module) -> bool:
    """A norm by name that holds the four tensors of a BatchNorm, all as buffers."""
    named = "FrozenBatchNorm" in type(module).__name__ and not isinstance(module, _BatchNorm)
    return named and all(module._buffers.get(key) is not None for key in _HELD)


def _thawed(name: str, frozen: nn.Module) -> nn.Module:
    weight, bias, mean, var = (frozen.get_buffer(key) for key in _HELD)
    options: dict[str, Any] = {"eps": getattr(frozen, "eps", _EPS), "device": "meta"}
    tail = list(frozen._modules) == ["drop", "act"]
    norm = _fused(len(weight), frozen, options) if tail else nn.BatchNorm2d(len(weight), **options)
    norm.weight, norm.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
    norm.running_mean, norm.running_var = mean, var
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    norm.train(frozen.training)
    if not mean.is_meta:
        _compare(name, frozen, norm)
    return norm


def _fused(channels: int, frozen: nn.Module, options: dict[str, Any]) -> Any:
    """timm's, with the activation that the frozen one called."""
    norm = require("timm.layers", "timm").BatchNormAct2d(channels, **options)
    norm.drop, norm.act = frozen.get_submodule("drop"), frozen.get_submodule("act")
    return norm


@torch.no_grad()
def _compare(name: str, frozen: nn.Module, norm: nn.Module) -> None:
    """Refuse a class that computes something else, or by another eps than it says.

    Raises:
        AnybatchError: the two differ in evaluation, on each channel's mean and a deviation to either side of it.
    """
    mean, var = (frozen.get_buffer(key).cpu().double() for key in ("running_mean", "running_var"))
    example = torch.stack([mean, mean + var.sqrt(), mean - var.sqrt()]).T.reshape(1, -1, 1, 3)
    # Copies, in float64 and by forward: no hook of the user's runs, and rounding hides no other eps.
    copies: list[Any] = [copy.deepcopy(each).cpu().double().eval() for each in (frozen, norm)]
    theirs, ours = (each.forward(example.clone()) for each in copies)
    if not torch.allclose(theirs, ours, rtol=1e-9, atol=1e-9):
        raise AnybatchError(
            f"thaw_: '{name}', a {type(frozen).__name__}, does not compute the BatchNorm of its weight, bias, "
            f"running_mean and running_var with eps={copies[1].eps}; leave it out by where=..."
        )
