"""Checks of options: one message a kind, naming the option, its value and what it may be."""

from typing import Any

from ..errors import AnybatchError

__all__ = ["check_choice", "check_divides", "check_flag", "check_groups", "check_number", "check_whole"]


def check_whole(what: str, name: str, value: Any, least: int = 1, none: bool = False) -> None:
    """Refuse all but whole numbers from ``least``; None passes if ``none``."""
    if none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise AnybatchError(
            f"{what}: {name}={value!r}; give a whole number of at least {least}{', or None' if none else ''}"
        )


def check_number(what: str, name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Refuse all but finite numbers from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == float("inf"):
        within = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}, and finite"
        raise AnybatchError(f"{what}: {name}={value!r}; give a number {within}")


def check_choice(what: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse all but the ``choices``."""
    if value not in choices:
        raise AnybatchError(f"{what}: {name}={value!r}; choose one of {', '.join(map(repr, choices))}")


def check_flag(what: str, name: str, value: Any) -> None:
    """Refuse all but True and False."""
    if not isinstance(value, bool):
        raise AnybatchError(f"{what}: {name}={value!r}; give True or False")


def check_divides(what: str, name: str, value: int, channels: int, multiples: bool = False) -> None:
    """Refuse all but divisors of ``channels``, and its multiples if ``multiples``."""
    if channels % value and not (multiples and value % channels == 0):
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        more = f", or a multiple of {channels}" if multiples else ""
        raise AnybatchError(
            f"{what}: {name}={value} does not divide {channels} channels; choose one of {divisors}{more}"
        )


def check_groups(what: str, examples_per_group: Any, sync: bool) -> None:
    """Refuse all but whole numbers and None, and groups of a batch that is spread over ranks."""
    check_whole(what, "examples_per_group", examples_per_group, none=True)
    if sync and examples_per_group:
        raise AnybatchError(
            f"{what}: sync=True with examples_per_group, of which ranks may have unequal numbers; leave one of them out"
        )
