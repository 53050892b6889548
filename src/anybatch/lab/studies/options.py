"""Methods as typed, taken apart: the value of one option, and the method without it."""

import inspect
import re
from fractions import Fraction
from typing import Any

from anybatch.lab.config import ClassifyConfig

__all__ = ["has_option", "option_of", "without_option"]

_VALUE = r"""('[^']*'|"[^"]*"|[^,()'"]+)"""  # quoted, or plain up to the next comma


def has_option(base: ClassifyConfig, method: str, name: str) -> bool:
    """Whether the method takes an option of that name."""
    return name in inspect.signature(type(base.parse(method, base.gradient_batch))).parameters


def option_of(base: ClassifyConfig, method: str, name: str) -> Any:
    """The value of an option, its default where it is not typed; a quoted fraction, '1/3', as one.

    The method has it, see `has_option`.
    """
    if share := re.search(rf"\b{name}\s*=\s*['\"](\d+)/(\d+)['\"]", method):
        return Fraction(int(share[1]), int(share[2]))
    return getattr(base.parse(method, base.gradient_batch), name)


def without_option(method: str, name: str) -> str:
    """The method as typed without that option: "cbn(window=4, kind='ring')" -> "cbn(kind='ring')"."""
    short = re.sub(rf"\b{name}\s*=\s*{_VALUE}\s*,?\s*", "", method)
    return re.sub(r"\(\s*\)$", "", re.sub(r",\s*\)$", ")", short))
