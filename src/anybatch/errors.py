"""The one base class of every error that anybatch raises on purpose.

A message names the call, the value that does not fit, and the mend.
"""

__all__ = ["AnybatchError"]


class AnybatchError(ValueError):
    """Something a user passed does not fit; the message says what and how to mend it."""
