"""What torch knows of a tensor or a function and does not say in one word."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_hand", "finite", "function_name", "version"]


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one made in inference mode, and inside a compiled graph."""
    return 0 if torch.compiler.is_dynamo_compiling() or tensor.is_inference() else tensor._version


def function_name(func: Callable[..., Any]) -> str:
    """What torch calls a function, whether it is one of torch, a method, in place or a property's reading."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":  # of a property such as y.T
        name = str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name.strip("_")


def at_hand(t: Tensor) -> bool:
    """Whether a value can be read without anyone waiting for it: no other device computes it, and no compiler."""
    return t.device.type == "cpu" and type(t) is Tensor and not torch.compiler.is_compiling()  # and it is no fake


def finite(t: Tensor) -> Tensor | bool:
    """Whether all of ``t`` is finite, and its sum: a bool where that is at hand, else one on the device."""
    total = t.sum()
    return math.isfinite(total.item()) if at_hand(total) else torch.isfinite(total)
