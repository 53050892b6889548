"""The one base class of every error that anybatch raises on purpose.

A message names the call, the value that does not fit, and the mend.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["AnybatchError", "did_you_mean", "first_line"]


class AnybatchError(ValueError):
    """Something a user passed does not fit; the message says what and how to mend it."""


def first_line(error: Exception) -> str:
    """What another library's error says, without its details; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The mend of a name that is not known: the nearest one that is, or ``otherwise`` where none is near."""
    close = get_close_matches(name, list(known), 1)
    return f"did you mean '{close[0]}'?" if close else otherwise
