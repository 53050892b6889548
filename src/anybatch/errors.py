"""The one base class of every error that anybatch raises on purpose.

A message names the call, the value that does not fit, and the mend.
"""

__all__ = ["AnybatchError", "first_line"]


class AnybatchError(ValueError):
    """Something a user passed does not fit; the message says what and how to mend it."""


def first_line(error: Exception) -> str:
    """What another library's error says, without its details; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
