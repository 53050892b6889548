"""How a hand-written kernel looks to torch.compile: one operator, with a fake of what it gives."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

__all__ = ["operator"]

P = ParamSpec("P")
R = TypeVar("R")


def operator(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of tensors the custom operator ``anybatch::<its name>`` in a graph, and leave it itself in eager.

    Args:
        fake: gives empty tensors of the shapes, dtypes and strides that the function gives.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        # An operator's way through torch's dispatcher costs more than the launch of a kernel: only a graph needs it.
        registered: Any = torch.library.custom_op(f"anybatch::{function.__name__}", function, mutates_args=())
        registered.register_fake(fake)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            chosen = registered if torch.compiler.is_compiling() else function
            return cast(R, chosen(*args, **kwargs))

        return call

    return decorate
