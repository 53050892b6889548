"""Norms with their activation fused to them, as timm has them: a BatchNorm with two children and the forward

    act(drop(batch_norm(x)))

What replaces such a norm keeps both children under their names and calls them itself.
"""

import re
from collections import OrderedDict
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["fused_class", "keep_tail", "tail_of"]


def fused_class(norm: nn.Module) -> type[_BatchNorm] | None:
    """The class of the fused norm that ``norm`` is, or replaces; None where it is none.

    One is told by its name, its children and that it has a forward of its own.
    """
    kind = type(norm)
    if hasattr(kind, "fused"):  # a layer of this library
        replaced: type[_BatchNorm] | None = norm.fused  # type: ignore[assignment]
        return replaced
    named = isinstance(norm, _BatchNorm) and re.fullmatch(r".+Act([123]d)?", kind.__name__)
    whole = list(norm._modules) == ["drop", "act"] and None not in norm._modules.values()
    return cast("type[_BatchNorm]", kind) if named and whole and kind.forward is not _BatchNorm.forward else None


def tail_of(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalising: its drop and act, or nothing."""
    if fused_class(norm) is None:
        return nn.Identity()
    return nn.Sequential(OrderedDict(drop=norm.get_submodule("drop"), act=norm.get_submodule("act")))


def keep_tail(source: nn.Module, target: nn.Module) -> None:
    """Let ``target``, made to replace ``source``, do what that does besides normalising."""
    kind = fused_class(source)
    if kind is None:
        return
    target.drop, target.act = source.drop, source.act
    if type(target) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):  # the way back
        target.__class__ = kind
    elif isinstance(target, nn.GroupNorm):
        target.__class__ = _GroupNormAct
    else:
        target.fused = kind  # type: ignore[assignment]


class _GroupNormAct(nn.GroupNorm):
    """torch's GroupNorm, then ``drop`` and ``act``."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation of the normalised ``x``."""
        drop: Any = self.drop
        act: Any = self.act
        out: Tensor = act(drop(super().forward(x)))
        return out
