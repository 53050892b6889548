"""A method as one types it, ``cbn(window=16)``, taken apart and put together: a name, and options by name."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from .errors import AnybatchError

__all__ = ["split_method", "tidy_method", "write_method"]


def split_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a method, whether there is such a one or not.

    Raises:
        AnybatchError: it is written otherwise than ``name`` or ``name(option=value, ...)``.
    """
    name, bracket, rest = text.strip().partition("(")
    try:
        return name.strip().lower(), _options(rest) if bracket else {}
    except SyntaxError as error:
        raise AnybatchError(f"method {text!r}: {error.msg}; write it like cbn(window=16)") from error
    except ValueError as error:
        raise AnybatchError(f"method {text!r}: {error}") from error


def write_method(name: str, options: Mapping[str, Any]) -> str:
    """What :func:`split_method` takes apart."""
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})" if options else name


def tidy_method(text: str) -> str:
    """The one way to write a method: "CBN( window = 16 )" -> "cbn(window=16)".

    Raises:
        AnybatchError: as :func:`split_method`.
    """
    return write_method(*split_method(text))


def _options(typed: str) -> dict[str, Any]:
    """The options in what follows a method's bracket, "window=16)"."""
    call = ast.parse(f"f({typed}", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise SyntaxError("options are given by name")
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in options:
            raise SyntaxError(f"{keyword.arg} is given twice")
        options[str(keyword.arg)] = _value(keyword)
    return options


def _value(keyword: ast.keyword) -> Any:
    """Of an option.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.literal_eval(keyword.value)
    except ValueError as error:
        typed, mend = ast.unparse(keyword.value), "give a number, True, False, None or text in quotes"
        if typed.lower() in ("true", "false", "none"):
            mend = f"write {keyword.arg}={typed.capitalize()}"
        elif isinstance(keyword.value, ast.Name):
            mend = f"write {keyword.arg}='{typed}'"
        elif re.fullmatch(r"\d+ / \d+", typed):
            mend = f"a share of a run is written {keyword.arg}='{typed.replace(' ', '')}'"
        raise ValueError(f"{keyword.arg}={typed} is no value: {mend}") from error
