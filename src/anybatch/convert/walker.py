"""Replaces the norms of a model in place, all or none, and takes them back."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.config import NormConfig
from ..layers.feed import FedLayer
from ..layers.surroundings import Fed, Surroundings
from .eligible import Where, batch_norms, refuse_wrapped, select
from .flow import Flow
from .pairing import Pairing, pair
from .report import Report, Row

__all__ = ["convert_", "revert_", "share_hooks", "swap"]

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert_(
    model: nn.Module,
    config: NormConfig,
    example_inputs: Any = None,
    where: Where = None,
    optimizer: Optimizers = None,
    process_group: Any = None,
) -> Report:
    """Turn the BatchNorms of a model into another method, in place; if anything raises, the model is as before.

    Parameters and buffers stay the same objects under the same names, hooks on the norms stay, a norm used in several
    places stays one norm. Norms that a method of this library made are converted again and start without history.

    Args:
        model: not yet wrapped (DistributedDataParallel, FSDP) or compiled.
        config: the method, such as ``ab.CBN()``.
        example_inputs: what one forward of the model takes, to see what stands around each norm: a tensor, a tuple of
            arguments, a dict of keyword arguments, or (tuple, dict). One example is enough. The model runs once,
            without gradients, in the mode it is in, and is left as it was. Needed where ``config.needs_example``.
        where: which norms: a function of (name, module), or glob patterns on names; all by default.
        optimizer: one or several that hold the model's parameters; parameters that the method adds join the group of
            the norm's weight.
        process_group: of torch.distributed, the ranks that a method with ``sync=True`` pools moments over; all by
            default.

    Returns:
        What was done to every norm, and why. ``print`` it.

    Raises:
        AnybatchError: nothing to convert, a wrapped model, missing or unfit example inputs, a norm that the method
            cannot replace, or an optimizer that holds a parameter the method drops.
    """
    if not isinstance(config, NormConfig):
        raise AnybatchError(
            f"convert_: the config is {config!r}; give an instance such as ab.CBN(), or ab.parse_method('cbn')"
        )
    if process_group is not None and not getattr(config, "sync", False):
        raise AnybatchError("convert_: a process_group is for a config with sync=True, e.g. ab.CBN(sync=True)")
    refuse_wrapped("convert_", model)
    reasons = select("convert_", model, where)
    found = batch_norms(model)
    norms = {name: found[name] for name, reason in reasons.items() if not reason}
    if config.needs_example and example_inputs is None:
        raise AnybatchError(
            f"convert_: {type(config).__name__} has to know what stands around each norm; pass example_inputs, what "
            "one forward of the model takes: a tensor, a tuple of arguments, a dict, or (tuple, dict)"
        )
    pairings = pair(model, norms, example_inputs) if config.needs_map else {}
    flow = Flow(model, norms.values(), example_inputs) if config.needs_flow else None
    around = {name: _around(norm, pairings.get(name), flow) for name, norm in norms.items()}
    placed = {name: config.at(around[name]) for name in norms}
    layers = {name: _build(placed[name][0], name, norm) for name, norm in norms.items()}
    with ExitStack() as undo:
        for name, layer in layers.items():
            if isinstance(layer, NormLayer):
                undo.callback(_unfollow, layer)
                layer.meet(around[name])
                layer.process_group = process_group
        joining = {name: _newcomers(name, norm, layers[name], optimizer) for name, norm in norms.items()}
        undo.pop_all()

    _replace(model, {norm: layers[name] for name, norm in norms.items()})
    for group, parameters in joining.values():
        if group is not None:
            group["params"].extend(parameters)
    return Report(
        tuple(
            Row(name, type(norm).__name__, (norm.num_features,), action="left", reason=reasons[name])
            if reasons[name]
            else _row(
                name, norm, layers[name], pairings.get(name), joining[name], placed[name][1], optimizer is not None
            )
            for name, norm in found.items()
        )
    )


def revert_(model: nn.Module) -> Report:
    """Take every layer of this library back to torch's BatchNorm, in place.

    BatchNorm's parameters, buffers and names stay; histories go, and so do parameters that a method added. Evaluation
    stays the same to the bit where it was BatchNorm's; where it was not, the report says so.

    Args:
        model: converted by ``convert_``, not wrapped or compiled.

    Returns:
        What was done to every norm.

    Raises:
        AnybatchError: no layer of this library is in the model, the model itself is one, or it is wrapped.
    """
    refuse_wrapped("revert_", model)
    found = batch_norms(model)
    layers = {name: norm for name, norm in found.items() if isinstance(norm, NormLayer)}
    if "" in layers:
        raise AnybatchError(
            "revert_: the model itself is the norm and cannot be replaced in place; use .to_batchnorm()"
        )
    if not layers:
        raise AnybatchError(
            f"revert_: the model has no layer of anybatch; its {len(found)} BatchNorms are not converted"
        )
    instead: dict[nn.Module, nn.Module] = {layer: layer.to_batchnorm() for layer in layers.values()}
    _replace(model, instead)
    rows = []
    for name, norm in found.items():
        row = Row(name, type(norm).__name__, (norm.num_features,), action="reverted")
        if name not in layers:
            row = replace(row, action="left", reason="not a layer of anybatch")
        else:
            plain, notes = instead[layers[name]], []
            if not layers[name].foldable:
                notes.append("its evaluation was not, or not always, torch's BatchNorm, and may change")
            row = replace(row, reason="; ".join(filter(None, [*notes, _went(norm, plain)])))
        rows.append(row)
    return Report(tuple(rows))


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the hooks registered on ``source``; their handles keep working, since the dicts are shared."""
    for kind in _HOOKS:
        theirs, own = getattr(source, kind), getattr(target, kind)
        if isinstance(own, dict) and own:
            own.update(theirs)
        else:
            setattr(target, kind, theirs)


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the replacements under every name of the modules they replace; order of names unchanged."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for old, new in replacements.items():
        if new is not old:
            share_hooks(old, new)
            _unfollow(old)
    swap(model, replacements)


def _build(config: NormConfig, name: str, norm: _BatchNorm) -> nn.Module:
    try:
        return config.build(norm)
    except AnybatchError as error:
        raise AnybatchError(f"convert_: '{name}': {error}") from error


def _around(norm: nn.Module, pairing: Pairing | None, flow: Flow | None) -> Surroundings:
    around = Surroundings()
    if pairing is not None:
        around = replace(
            around,
            feeds=tuple(Fed(feed.module, feed.inside) for feed in pairing.feeds),
            exclusive=pairing.exclusive,
            rows=pairing.rows,
        )
    if flow is not None:
        around = replace(
            around,
            activation=flow.activation_of(norm),
            shortcut=flow.is_shortcut(norm),
            called=norm in flow.called,
        )
    return around


def _unfollow(layer: nn.Module) -> None:
    if isinstance(layer, FedLayer):
        layer.unfollow()


def _newcomers(
    name: str, norm: nn.Module, layer: nn.Module, optimizer: Optimizers
) -> tuple[dict[str, Any] | None, list[nn.Parameter]]:
    """The parameters that the layer has and the norm had not, and the optimizer group they shall join.

    Raises:
        AnybatchError: an optimizer holds a parameter of the norm that the layer has not, or decays its gamma to 1.
    """
    old, new = list(norm.parameters()), list(layer.parameters())
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or [])
    groups = [group for each in optimizers for group in each.param_groups]
    kept = {id(p) for p in new}
    if any(p is q and id(p) not in kept for p in old for group in groups for q in group["params"]):
        raise AnybatchError(
            f"convert_: the optimizer holds a parameter of '{name}' that {type(layer).__name__} has not; build the "
            "optimizer after converting"
        )
    homes = [group for group in groups if any(p is q for p in old for q in group["params"])]
    known = {id(p) for p in old}
    added = [p for p in new if id(p) not in known]
    if added and homes and homes[0].get("decays_to") and homes[0].get("weight_decay"):
        raise AnybatchError(
            f"convert_: the new parameters of '{name}' are not to decay as its gamma does; convert first, then call "
            "param_groups and build the optimizer"
        )
    return homes[0] if homes else None, added


def _row(
    name: str,
    norm: _BatchNorm,
    layer: nn.Module,
    pairing: Pairing | None,
    joining: tuple[dict[str, Any] | None, list[nn.Parameter]],
    why: str,
    optimized: bool,
) -> Row:
    row = Row(name, type(norm).__name__, (norm.num_features,))
    if layer is norm:
        return replace(row, action="left", reason=why or "it is what was asked for")
    notes = [why, layer.note if isinstance(layer, NormLayer) else "", _went(norm, layer)]
    group, added = joining
    if added:
        new = {id(p) for p in added}
        notes.append("adds " + " and ".join(key for key, p in layer.named_parameters(recurse=False) if id(p) in new))
        if group is None and optimized:
            notes.append("its new parameters are in no optimizer group")
        if group is not None and group.get("weight_decay"):
            notes.append(f"which decay with its weight, by {group['weight_decay']}")
    if pairing is not None:
        notes += [pairing.reason, pairing.shared and f"not foldable: {pairing.shared}", pairing.note]
    fed_by = tuple(feed.name for feed in pairing.feeds) if pairing is not None else ()
    return replace(row, fed_by=fed_by, paired=pairing is None or bool(fed_by), reason="; ".join(filter(None, notes)))


def _went(norm: _BatchNorm, layer: nn.Module) -> str:
    """What of the norm the layer has not."""
    kept = {id(p) for p in layer.parameters()}
    gone = [key for key, p in norm.named_parameters(recurse=False) if id(p) not in kept]
    if getattr(norm, "alpha", 0.0) and not getattr(layer, "alpha", 0.0):
        gone.append(f"alpha={norm.alpha}")
    return f"its {' and '.join(gone)} went" if gone else ""
