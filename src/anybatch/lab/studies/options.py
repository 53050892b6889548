"""Options of methods as typed: the value of one, and the method without it."""

import inspect
from fractions import Fraction
from typing import Any

from anybatch.lab.config import ClassifyConfig
from anybatch.typed import split_method, write_method

__all__ = ["has_option", "option_of", "without_option"]


def has_option(base: ClassifyConfig, method: str, name: str) -> bool:
    """Whether the method takes an option of that name."""
    return name in inspect.signature(type(base.parse(method, base.gradient_batch))).parameters


def option_of(base: ClassifyConfig, method: str, name: str) -> Any:
    """The value of an option, its default where it is not typed; a quoted fraction, '1/3', as one.

    The method has it, see `has_option`.
    """
    typed = split_method(method)[1].get(name)
    if isinstance(typed, str) and "/" in typed:
        return Fraction(typed)
    return getattr(base.parse(method, base.gradient_batch), name)


def without_option(method: str, name: str) -> str:
    """The method without that option: "cbn(window=4, kind='ring')" -> "cbn(kind='ring')"."""
    method, options = split_method(method)
    options.pop(name, None)
    return write_method(method, options)
