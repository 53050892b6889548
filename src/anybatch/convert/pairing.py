"""Which linear map feeds each norm.

The model runs once on example inputs and the tensors are followed by identity (``tracing``); a pair counts only if the
map's closed forms reproduce the moments of what the norm saw (``closed_form``); where torch.fx can trace the model,
its opinion is compared.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ..core.linear_map import LinearMap
from ..errors import AnybatchError
from .snapshot import untouched
from .tracing import Ledger, Visit, tensors_in

__all__ = ["Feed", "Pairing", "as_call", "pair"]


@dataclass(frozen=True)
class Feed:
    """A map that feeds a norm.

    Args:
        name: of the map in the model.
        module: the map.
        inside: the norm is a child of the map and runs inside the map's forward.
    """

    name: str
    module: nn.Module
    inside: bool = False


@dataclass(frozen=True)
class Pairing:
    """What feeds one norm.

    Args:
        feeds: the maps, in order of their first call; none where the norm is unpaired.
        reason: why it is unpaired; else empty.
        shared: who else uses what the maps give, or their weights; empty when the norm alone does.
        note: another opinion, of torch.fx; mostly empty.
        rows: of its input for each example that the model was given; None if it was not called.
        folds_into: the maps of an unpaired norm that it can be folded into all the same, for example those that pad by
            themselves: no closed form explains their output, but it scales as their weight does.
    """

    feeds: tuple[Feed, ...] = ()
    reason: str = ""
    shared: str = ""
    note: str = ""
    folds_into: tuple[Feed, ...] = ()
    rows: int | None = None

    @property
    def exclusive(self) -> bool:
        """The norm is the only one to use what its maps give, so it can be folded into them."""
        return bool(self.feeds) and not self.shared


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): from a tensor, a tuple of arguments, a dict, or (tuple, dict).

    Raises:
        AnybatchError: they are something else, such as a bare list.
    """
    match example_inputs:
        case Tensor():
            return (example_inputs,), {}
        case (tuple() as args, dict() as kwargs):
            return args, kwargs
        case tuple():
            return example_inputs, {}
        case dict():
            return (), example_inputs
    raise AnybatchError(
        f"example_inputs is a {type(example_inputs).__name__}; it must be a tensor, a tuple of arguments, a dict of "
        "keyword arguments, or (tuple, dict). A model that takes one list gets it as (the_list,)"
    )


def pair(model: nn.Module, norms: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, Pairing]:
    """Find the maps that feed each norm. The model, its buffers and the random states are as before, also on an error.

    Args:
        model: run once without gradients, in the mode it is in, so that branches used only in training are seen in
            training mode; its norms evaluate.
        norms: those to pair, by name.
        example_inputs: see ``as_call``; one example is enough.

    Returns:
        A pairing for each name in ``norms``.

    Raises:
        AnybatchError: the model raises on the example inputs.
    """
    args, kwargs = as_call(example_inputs)
    ledger = Ledger(model, list(norms.values()))
    ledger.run(args, kwargs)
    given = _examples((args, kwargs), ledger.rows.values())
    pairings = {
        name: replace(_judge(ledger, norm), rows=max(1, ledger.rows[norm] // given) if norm in ledger.rows else None)
        for name, norm in norms.items()
    }
    opinions = _opinions(model, norms)
    for name, pairing in pairings.items():
        seen = opinions.get(name)
        if seen is not None and seen not in {feed.name for feed in pairing.feeds}:
            pairings[name] = replace(pairing, note=f"torch.fx sees '{seen}' feed it")
    return pairings


def _examples(inputs: Any, rows: Iterable[int]) -> int:
    """How many examples a model was given: the largest length in its inputs that divides the fewest rows of a norm.

    A batch of images is as long as the stem's input, whatever else is given beside it; a batch of clips is not, and
    its length divides the number of their frames.
    """
    fewest = min((n for n in rows if n), default=1)
    lengths = {
        len(each) for each in (*tensors_in(inputs), *_lists(inputs)) if not isinstance(each, Tensor) or each.dim()
    }
    return max((n for n in lengths if n and fewest % n == 0), default=fewest)


def _lists(value: Any) -> Iterator[Sequence[Any]]:
    """The lists in nested containers; what a call takes besides, such as its tuple of arguments, is none."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _lists(item)
    elif isinstance(value, (list, tuple)):
        if isinstance(value, list):
            yield value
        for item in value:
            yield from _lists(item)


def _judge(ledger: Ledger, norm: nn.Module) -> Pairing:
    visits = ledger.visits[norm]
    if not visits:
        return Pairing(reason="the example run never called it")
    if all(visit.empty for visit in visits):
        return Pairing(reason="the example run gave it no values")
    faults = [visit for visit in visits if visit.reason]
    reason = _fault(ledger, faults[0], len(faults) < len(visits)) if faults else ""
    if not all(visit.scales for visit in faults):
        return Pairing(reason=reason)
    feeds: dict[nn.Module, Feed] = {}
    for visit in visits:
        assert visit.call is not None
        module = visit.call.map
        feeds.setdefault(module, Feed(ledger.names[module], module, visit.inside))
    maps = tuple(feeds.values())
    shared = "; ".join(dict.fromkeys(other for feed in maps for other in _others(ledger, feed, norm)))
    return Pairing(reason=reason, shared=shared, folds_into=maps) if faults else Pairing(maps, shared=shared)


def _fault(ledger: Ledger, visit: Visit, sometimes: bool) -> str:
    by = f"after '{ledger.names[visit.call.map]}': " if visit.call is not None else ""
    return f"{'in some of its calls, ' if sometimes else ''}{by}{visit.reason}"


def _others(ledger: Ledger, feed: Feed, norm: nn.Module) -> list[str]:
    """Uses of the map's output or weight other than by the norm."""
    found = []
    for call in ledger.calls:
        if call.map is not feed.module:
            continue
        found += [f"'{feed.name}' also feeds '{ledger.names[other]}'" for other in call.norms if other is not norm]
        if not call.norms:
            found.append(f"'{feed.name}' also runs where this norm does not follow")
        elif call.output is not None:
            found += [f"the output of '{feed.name}' is also used by {reader}" for reader in call.output.readers]
            found += [f"the output of '{feed.name}' is changed by {changer}" for changer in call.output.changed_by]
    if feed.module in ledger.borrowed:
        found.append(f"the weight of '{feed.name}' is also used by {ledger.borrowed[feed.module]}")
    return found


def _opinions(model: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, str]:
    """Norm -> map, as torch.fx sees it; nothing where it cannot trace the model or sees several."""
    seen: dict[str, set[str]] = {}
    try:
        with untouched(model):
            # Tracing runs the model's code on proxies, which that code may store: only a copy, without data, is safe.
            tensors = [*model.parameters(), *model.buffers()]
            ghost = copy.deepcopy(model, {id(t): t.to("meta") for t in tensors})
            graph = fx.Tracer().trace(ghost)
    except Exception:  # whatever the model's code does with a proxy: no opinion then
        return {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if node.target in norms and isinstance(source, fx.Node):
            fed = source.op == "call_module" and LinearMap.of(model.get_submodule(str(source.target))) is not None
            seen.setdefault(str(node.target), set()).add(str(source.target) if fed else "")
    return {name: maps.copy().pop() for name, maps in seen.items() if len(maps) == 1 and "" not in maps}
