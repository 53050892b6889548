"""Parameter groups in which gamma decays towards 1 and beta towards 0 (Summers & Dinneen, ICLR 2020, section 3.3).

    penalty = wd / 2 * ( (gamma - 1)^2 + beta^2 )

An optimizer decays towards 0. So around each of its steps the gammas are shifted by -1: it then sees gamma - 1, and
what it does to decay that, coupled as SGD or decoupled as AdamW, is exact. (An optimizer that scales its step by the
size of a parameter, as Adafactor, takes the size of gamma - 1.) The shift rides on torch's hooks for steps
of any optimizer, innermost, so that no other hook sees it, and touches only groups made here.
"""

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.options import check_number

__all__ = ["param_groups"]

_TARGET = "decays_to"
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_watching: list[RemovableHandle] = []  # the hook on every optimizer's steps, from the first call on
_shifting: MutableMapping[Optimizer, tuple[RemovableHandle, RemovableHandle]] = weakref.WeakKeyDictionary()
_shifts: MutableMapping[Optimizer, "weakref.ref[_Shift]"] = weakref.WeakKeyDictionary()  # of the last step
_held: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # gammas that are shifted now


def param_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """A model's parameters as groups for an optimizer: norms decay gamma towards 1 and beta towards 0, exactly.

    Give the groups to an optimizer: ``torch.optim.SGD(ab.param_groups(model, 5e-4, 5e-4), lr=0.1)``. Closures,
    gradient scalers, schedulers and the optimizer's state_dict work as ever. Convert the model first.

    Args:
        model: converted or not; torch's own norms count too.
        weight_decay: of everything that is not a norm's, towards 0.
        norm_weight_decay: of the norms' parameters. Those a method's source leaves undecayed (gates of IEBN, gamma
            and beta of Proxy Norm) have none.

    Returns:
        Groups without overlap that hold every parameter once; empty ones are left out.

    Raises:
        AnybatchError: a decay below 0, or a model without parameters.
    """
    check_number("param_groups", "weight_decay", weight_decay, 0)
    check_number("param_groups", "norm_weight_decay", norm_weight_decay, 0)
    targets = {id(p): target for p, target in _norm_parameters(model)}
    by_target: dict[float | None, list[nn.Parameter]] = {1.0: [], 0.0: [], None: []}
    others = []
    for parameter in model.parameters():
        if id(parameter) in targets:
            by_target[targets[id(parameter)]].append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": weight_decay, _TARGET: 0.0},
        {"params": by_target[1.0], "weight_decay": norm_weight_decay, _TARGET: 1.0},
        {"params": by_target[0.0], "weight_decay": norm_weight_decay, _TARGET: 0.0},
        {"params": by_target[None], "weight_decay": 0.0, _TARGET: 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise AnybatchError("param_groups: the model has no parameters; give the one that is trained")
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_prepare))
    return groups


def _norm_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, float | None]]:
    for module in model.modules():
        if isinstance(module, _NORMS):
            decays_to = module.decays_to if isinstance(module, NormLayer) else NormLayer.decays_to
            for name, parameter in module.named_parameters(recurse=False):
                yield parameter, decays_to.get(name)


class _Shift:
    """The gammas of one optimizer, shifted for the length of one step.

    The step may raise, and no hook runs then: what holds the shift alive is the step's own frame, and the end of the
    shift puts the gammas back.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = [group for group in optimizer.param_groups if group.get(_TARGET) and group.get("weight_decay")]
        self._shifted: list[tuple[nn.Parameter, Tensor, float]] = []

    @torch.no_grad()
    def hold(self) -> None:
        """Shift what the step will change: not a gamma without gradient, nor one that a step around this one holds."""
        for group in self._groups:
            for gamma in group["params"]:
                if gamma.grad is not None and gamma not in _held:
                    _held[gamma] = True
                    self._shifted.append((gamma, gamma.detach().clone(), group[_TARGET]))
                    gamma.sub_(group[_TARGET])

    @torch.no_grad()
    def release(self) -> None:
        """Put the gammas back, each with what the step has changed: to the bit where that is nothing."""
        while self._shifted:
            gamma, before, target = self._shifted.pop()
            gamma.copy_(before + (gamma - (before - target)))
            _held.pop(gamma, None)

    __del__ = release


class _Kwargs(dict[str, Any]):
    """The keyword arguments of a step, which live as long as it runs."""

    shift: _Shift


def _prepare(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    """Before any other hook of a step: make sure that ours run last before it and first after it."""
    if not any(group.get(_TARGET) for group in optimizer.param_groups):
        return
    last = _shifts[optimizer]() if optimizer in _shifts else None
    if last is not None:  # a step that raised, and whose frame someone keeps
        last.release()
    if optimizer not in _shifting:
        _shifting[optimizer] = optimizer.register_step_pre_hook(_before), optimizer.register_step_post_hook(_after)
    before, after = _shifting[optimizer]
    optimizer._optimizer_step_pre_hooks.move_to_end(before.id)  # type: ignore[attr-defined]
    optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]


def _before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, _Kwargs]:
    shift = _Shift(optimizer)
    _shifts[optimizer] = weakref.ref(shift)
    shift.hold()
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")

    def unshifted() -> Any:
        shift.release()  # and so it stays if the closure raises, since the step then ends
        loss = closure()  # type: ignore[misc]
        shift.hold()
        return loss

    new = _Kwargs(kwargs)
    new.shift = shift
    if closure is None:
        return args, new
    new["closure"] = unshifted
    return args[:1], new


def _after(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    assert isinstance(kwargs, _Kwargs)  # what _before gave
    kwargs.shift.release()
