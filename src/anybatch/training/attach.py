"""Tells the layers of a model when the optimizer has made a step, and by how much the loss is scaled."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import AnybatchError

__all__ = ["Attached", "CountsSteps", "ScalesLoss", "attach"]


@runtime_checkable
class CountsSteps(Protocol):
    """A layer that gathers something between two steps of the optimizer."""

    def attached(self, by: int) -> None:
        """``by`` more optimizers (or fewer, if negative) will say when they step."""

    def optimizer_stepped(self) -> None:
        """The weights have moved: what was gathered belongs to the past."""


@runtime_checkable
class ScalesLoss(Protocol):
    """A layer that keeps something of the gradients from one backward to the next."""

    def scaled_by(self, scale: Tensor | None) -> None:
        """The loss is multiplied by ``scale``, a tensor that its scaler changes in place; None: by nothing."""


class Attached:
    """A model's layers attached to optimizers; :meth:`remove` ends it, and so does the end of a ``with`` statement."""

    def __init__(self, layers: Sequence["weakref.ref[Any]"], hooks: Mapping[Optimizer, RemovableHandle]) -> None:
        # An optimizer that is gone ends its part by itself.
        self._ends = [weakref.finalize(optimizer, _end, layers, hook) for optimizer, hook in hooks.items()]
        for end in self._ends:
            end.atexit = False

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for end in self._ends:
            end()

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


def _end(layers: Sequence["weakref.ref[Any]"], hook: RemovableHandle) -> None:
    hook.remove()
    for layer in (ref() for ref in layers):
        if layer is not None:
            layer.attached(-1)


def attach(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], scaler: GradScaler | None = None) -> Attached:
    """Let the model's layers know, by the optimizer's own hook, when it makes a step; once, before training.

    Layers that need no such signal are none the worse for it. A step that a gradient scaler skips is no step, but fused
    optimizers are called then too, which ends the accumulated batch early and does no harm. An optimizer that moves the
    weights between several evaluations of its closure, such as LBFGS, gives its signal after the last one only: it is
    not for layers that gather. A new optimizer is attached anew.

    Args:
        model: converted; its layers at the time of the call.
        optimizer: one or several, the one whose step ends an accumulated batch.
        scaler: of the loss, where one is used: what layers keep of the gradients is then kept unscaled, so that a
            change of the scale leaves no trace in it.

    Returns:
        A handle: ``remove()`` it, or use it in a ``with`` statement. It may be dropped.

    Raises:
        AnybatchError: ``optimizer`` is no torch optimizer, or ``scaler`` no GradScaler.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if (
        not isinstance(optimizers, Sequence)
        or not optimizers
        or not all(isinstance(each, Optimizer) for each in optimizers)
    ):
        raise AnybatchError(
            f"attach: the optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer, or several (of a "
            "wrapper, its .optimizer)"
        )
    optimizers = [_unwrapped(each) for each in optimizers]
    if scaler is not None:  # a second call for another optimizer may leave it out
        scale = _scale_of(scaler, model)
        for module in model.modules():
            if isinstance(module, ScalesLoss):
                module.scaled_by(scale)
    layers = [module for module in model.modules() if isinstance(module, CountsSteps)]
    refs = [weakref.ref(layer) for layer in layers]

    def stepped(*_: Any) -> None:
        for layer in (ref() for ref in refs):
            if layer is not None:
                layer.optimizer_stepped()

    hooks = {each: each.register_step_post_hook(stepped) for each in optimizers}
    for layer in layers:
        layer.attached(len(hooks))
    return Attached(refs, hooks)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps: Accelerate's is one, and holds one."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def _scale_of(scaler: GradScaler, model: nn.Module) -> Tensor | None:
    """The tensor on the device that the scaler changes in place; None where nothing is scaled."""
    if not isinstance(scaler, GradScaler):
        raise AnybatchError(f"attach: the scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler")
    if not scaler.is_enabled():
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    scaler.scale(torch.ones((), device=device))  # makes the scale, which else the first loss makes
    return scaler._scale
