"""Which cases of a long test `make test` runs; `make thorough` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def usually(wanted: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, of several arguments where they are tuples, marked thorough unless wanted each time."""
    wanted, cases = list(wanted), list(cases)
    unknown = [each for each in wanted if each not in cases]
    assert not unknown, f"no cases: {unknown}"
    arguments = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in wanted else pytest.mark.thorough for case in cases]
    return [pytest.param(*each, marks=mark) for each, mark in zip(arguments, marks, strict=True)]
