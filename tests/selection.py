"""Which cases of a long test `make test` runs; `make thorough` runs the others."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def usually(wanted: Iterable[Any] | Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """The cases, and those that are not wanted each time marked thorough; every wanted one must be a case."""
    cases = list(cases)
    if not callable(wanted):
        chosen = list(wanted)
        unknown = [each for each in chosen if each not in cases]
        assert not unknown, f"no cases: {unknown}"
        wanted = chosen.__contains__
    return [pytest.param(case, marks=() if wanted(case) else pytest.mark.thorough) for case in cases]
