"""Inference without norms: each is folded into the linear map that feeds it.

gamma (W p + b - mean) / sqrt(var + eps) + beta  =  (a W) p + a b + (beta - a mean),    a = gamma / sqrt(var + eps)
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..convert.eligible import batch_norms, obstacle, refuse_wrapped
from ..convert.pairing import Feed, Pairing, pair
from ..convert.walker import share_hooks, swap
from ..core.affine import scale_and_shift
from ..core.linear_map import LinearMap
from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.feed import FedLayer
from ..layers.fused import tail_of

__all__ = ["fold", "fold_weights", "refusals"]


def fold_weights(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The weight and bias of the map followed by scale * y + shift, computed in float64.

    Args:
        weight: (C, C_in / groups, *kernel), (C, C_in) for Linear; (C_in, C / groups, *kernel) if ``transposed``.
        bias: (C,) or None.
        scale: (C,).
        shift: (C,).
        transposed: whether the map is a transposed convolution.
        groups: of the map; read if ``transposed``.

    Returns:
        Weight and bias, in the dtype and on the device of ``weight``.
    """
    wide, scale, shift = (t.detach().cpu().double() for t in (weight, scale, shift))
    if transposed:
        by_group = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        wide = (wide.view(groups, -1, *wide.shape[1:]) * by_group).flatten(0, 1)
    else:
        wide = wide * scale.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        shift = shift + scale * bias.detach().cpu().double()
    return wide.to(weight), shift.to(weight)


def fold(model: nn.Module, example_inputs: Any = None, strict: bool = True) -> nn.Module:
    """A copy of the model for inference in which every norm is folded into the map before it, and is nn.Identity.

    Args:
        model: in eval mode; converted, or with torch's BatchNorm. It is left as it is.
        example_inputs: what one forward takes (see ``convert_``), to find the maps of norms that follow none: those of
            a model that was not converted, or whose method needs no map.
        strict: raise if a norm cannot be folded; otherwise such norms stay, this library's as torch's BatchNorm.

    Returns:
        The copy, in eval mode, without hooks of this library.

    Raises:
        AnybatchError: the model is training, wrapped, or without BatchNorm; or norms cannot be folded, each with its
            reason: no map feeds it, its map's output or weight has other users, the map's weight is computed
            (weight_norm), it keeps no running statistics, or it does more than BatchNorm.
    """
    pairings, reasons = _plan(model, example_inputs)
    if any(reasons.values()) and (strict or (example_inputs is None and all(reasons.values()))):
        raise AnybatchError(_complaint(reasons))

    names = {name: [feed.name for feed in _maps(pairings[name])] for name, reason in reasons.items() if not reason}
    folded = copy.deepcopy(model)
    instead: dict[nn.Module, nn.Module] = {}
    for name, norm in batch_norms(folded).items():
        plain = norm.to_batchnorm() if isinstance(norm, NormLayer) and norm.foldable else norm
        if plain is not norm and isinstance(norm, FedLayer):
            norm.unfollow()
        if name in names:
            for fed_by in names[name]:
                _fold_into(folded.get_submodule(fed_by), plain)
            instead[norm] = tail_of(norm).eval()
        elif plain is not norm:
            instead[norm] = plain
    for old, new in instead.items():
        share_hooks(old, new)
    swap(folded, instead)
    return folded


def refusals(model: nn.Module, example_inputs: Any = None) -> dict[str, str]:
    """Why each norm would not be folded, by name and in the model's order; '' for one that would.

    Args:
        model: as for :func:`fold`.
        example_inputs: likewise.

    Raises:
        AnybatchError: as there, but for norms that cannot be folded.
    """
    return _plan(model, example_inputs)[1]


def _plan(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Pairing], dict[str, str]]:
    """What feeds each norm, and why it cannot be folded, '' where it can."""
    refuse_wrapped("fold", model)
    norms = batch_norms(model)
    if not norms or "" in norms:
        raise AnybatchError(f"fold: {type(model).__name__} has no BatchNorm inside that could be folded")
    if model.training or any(norm.training for norm in norms.values()):
        raise AnybatchError(
            "fold: the model is in training mode, and folding is for inference: call model.eval() first"
        )
    pairings = _pairings(model, norms, example_inputs)
    reasons = {name: _refusal(norm, pairings[name]) for name, norm in norms.items()}
    feeding = Counter(feed.module for pairing in pairings.values() for feed in _maps(pairing))
    for name, pairing in pairings.items():
        if several := [feed.name for feed in _maps(pairing) if feeding[feed.module] > 1]:
            reasons[name] = reasons[name] or f"'{several[0]}' feeds several norms"
    return pairings, reasons


def _pairings(model: nn.Module, norms: dict[str, _BatchNorm], example_inputs: Any) -> dict[str, Pairing]:
    names = {module: name for name, module in model.named_modules()}
    found, unknown = {}, {}
    for name, norm in norms.items():
        maps = norm.maps if isinstance(norm, FedLayer) else ()
        if not maps:
            unknown[name] = norm
        elif any(module not in names for module in maps):
            found[name] = Pairing(reason="it follows a map that is not in the model")
        else:
            shared = "" if norm.exclusive else "the output of its map has other users"
            found[name] = Pairing(tuple(Feed(names[module], module) for module in maps), shared=shared)
    if unknown and example_inputs is not None:
        return found | pair(model, unknown, example_inputs)
    return found | dict.fromkeys(
        unknown,
        Pairing(reason="which map feeds it is not known yet: pass example_inputs, what one forward of the model takes"),
    )


def _maps(pairing: Pairing) -> tuple[Feed, ...]:
    """What the norm would be folded into."""
    return pairing.feeds or pairing.folds_into


def _refusal(norm: _BatchNorm, pairing: Pairing) -> str:
    if not isinstance(norm, nn.SyncBatchNorm) and (reason := obstacle(norm)):  # which evaluates as BatchNorm
        return reason
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if alpha := getattr(norm, "alpha", 0.0):
        return f"it evaluates with alpha={alpha} of an example's own moments: weigh_examples_(model, 0) takes that back"
    if not getattr(norm, "foldable", True):
        return f"{type(norm).__name__} in evaluation is more than a scale and a shift per channel"
    if not _maps(pairing) or pairing.shared:
        return pairing.shared or pairing.reason
    for feed in _maps(pairing):
        computed = parametrize.is_parametrized(feed.module) or "weight" not in feed.module._parameters
        if computed:
            return f"'{feed.name}' computes its weight (weight_norm, pruning or the like): make that permanent first"
    return ""


def _complaint(reasons: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            by_reason.setdefault(reason, []).append(f"'{name}'")
    count = sum(len(names) for names in by_reason.values())
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        lines.append(f"  {', '.join(names[:8])}{more}: {reason}")
    head = f"fold: {count} of {len(reasons)} norms cannot be folded (strict=False leaves such norms in place):"
    return "\n".join([head, *lines])


@torch.no_grad()
def _fold_into(module: nn.Module, norm: _BatchNorm) -> None:
    geometry, weight, bias = LinearMap.of(module), module.weight, module.bias
    assert geometry is not None
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    gamma, beta = (None if p is None else p.cpu().double() for p in (norm.weight, norm.bias))
    scale, shift = scale_and_shift(mean, var, gamma, beta, norm.eps)
    new_weight, new_bias = fold_weights(weight, bias, scale, shift, geometry.transposed, geometry.groups)
    # New parameters: the old ones may be another module's too.
    module.weight = nn.Parameter(new_weight, requires_grad=weight.requires_grad)
    module.bias = nn.Parameter(new_bias, requires_grad=weight.requires_grad)
