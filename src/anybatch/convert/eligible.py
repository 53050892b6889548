"""Which norms of a model can be replaced, and why the others are left alone."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.fused import fused_class

__all__ = ["Where", "batch_norms", "matches", "obstacle", "refuse_wrapped", "select"]

Where = Callable[[str, nn.Module], bool] | str | Sequence[str] | None

# By name, because importing torch.distributed.fsdp to ask would cost every user a second.
_WRAPPERS = {
    "DistributedDataParallel": "before wrapping it, or pass ddp.module and wrap that anew",
    "DataParallel": "before wrapping it, or pass model.module (and train under DistributedDataParallel, since "
    "replicas of DataParallel would share one history)",
    "FullyShardedDataParallel": "before wrapping it",
    "FSDPModule": "before fully_shard",
    "OptimizedModule": "before torch.compile, or pass compiled._orig_mod and compile that anew",
}


def refuse_wrapped(call: str, model: nn.Module) -> None:
    """Refuse models that other parts of torch hold on to, so that replacing modules would go behind their back.

    Raises:
        AnybatchError: the model or a part of it is wrapped (DistributedDataParallel, DataParallel, FSDP) or compiled.
    """
    for name, module in model.named_modules():
        of_torch = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")]
        kind = next((c for c in of_torch if c in _WRAPPERS), None)
        if kind is None and getattr(module, "_compiled_call_impl", None) is not None:
            kind = "OptimizedModule"
        if kind is not None:
            place = f"'{name}'" if name else "the model"
            raise AnybatchError(f"{call}: {place} is a {kind}; call {call} {_WRAPPERS[kind]}")


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every norm of BatchNorm's family, under its first name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def obstacle(norm: _BatchNorm) -> str:
    """Why ``norm`` cannot be replaced; empty when it can."""
    if isinstance(norm, nn.SyncBatchNorm):
        return "SyncBatchNorm: revert it to BatchNorm first"
    if any(is_lazy(p) for p in [*norm.parameters(), *norm.buffers()]):
        return "lazy and not initialised: run one forward of the model first"
    own_forward = type(norm).forward is not _BatchNorm.forward or "forward" in vars(norm)
    if own_forward and not isinstance(norm, NormLayer) and fused_class(norm) is None:
        return f"{type(norm).__name__} has a forward of its own, which would be lost"
    return ""


def select(call: str, model: nn.Module, where: Where) -> dict[str, str]:
    """Why each norm is left alone, '' for those to be replaced, by name and in the model's order.

    Raises:
        AnybatchError: there is no norm, ``where`` matches none, or none that it matches can be replaced.
    """
    norms = batch_norms(model)
    if "" in norms:
        raise AnybatchError(
            f"{call}: the model itself is a {type(model).__name__}, which cannot be replaced in place; wrap it, e.g. "
            "in nn.Sequential, or build the layer with config.build(norm)"
        )
    if not norms:
        others = Counter(type(m).__name__ for m in model.modules() if _is_some_norm(m))
        seen = ", ".join(f"{count} {name}" for name, count in others.items()) or "no norm of any kind"
        raise AnybatchError(f"{call}: the model has no BatchNorm; it has {seen}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    chosen = {first for first, norm in norms.items() if any(matches(where, alias, norm) for alias in names[norm])}
    if not chosen:
        patterns = [where] if isinstance(where, str) else [] if callable(where) else list(where or [])
        close = [n for pattern in patterns for n in difflib.get_close_matches(pattern, norms, n=3, cutoff=0.3)]
        shown = ", ".join(list(dict.fromkeys([*close, *norms]))[:5])
        raise AnybatchError(
            f"{call}: where={where!r} matches none of the model's {len(norms)} norms; there are {shown}"
        )
    reasons = {n: obstacle(norm) if n in chosen else "excluded by where" for n, norm in norms.items()}
    if all(reasons.values()):
        said = "; ".join(f"'{n}': {reasons[n]}" for n in [n for n in norms if n in chosen][:5])
        raise AnybatchError(f"{call}: none of the norms can be replaced: {said}")
    return reasons


def _is_some_norm(module: nn.Module) -> bool:
    """Whether a module is named a norm, not only a block that has norms, or does without."""
    has_parts = next(module.children(), None) is not None
    name = r"norm(act)?(\dd)?$" if has_parts else "norm"
    return re.search(name, type(module).__name__, re.IGNORECASE) is not None


def matches(where: Where, name: str, norm: nn.Module) -> bool:
    """Whether ``where`` chooses the norm of this name."""
    if where is None:
        return True
    if callable(where):
        return where(name, norm)
    return any(fnmatchcase(name, pattern) for pattern in ([where] if isinstance(where, str) else where))
