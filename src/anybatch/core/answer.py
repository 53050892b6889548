"""How moments that were pooled exponentially (core/exponential.py) answer to the weights: :class:`Response` of theirs.

With f = (dL/dmean, 2 dL/dvar, back_mean, back_var), 1/2 dvar/dmean(W) = (1 - s) gap and mean_by, var_by of what was
carried, there goes by yesterday's P and D

    h = (1 - s) g,   d = (1 - s) (mean_by g + var_by 2 dL/dvar),   g = dL/dmean + gap 2 dL/dvar

Yesterday's D is today's, less what today added to it, over 1 - at.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TIMES", "By", "answer", "answer_unseen"]

TIMES = 8  # as often may rounding grow in (1 - s) / (1 - at)


class By(NamedTuple):
    """What :func:`answer` needs besides f: (C,), or a number."""

    s: Tensor | float
    at: Tensor | float
    through: Tensor | float  # whether there is a gradient through the past
    mean_by: Tensor | None
    var_by: Tensor
    gap: Tensor  # 1/2 dvar/dmean(W), over (1 - s)
    apart: Tensor | None  # positions' mean less the past's, times (1 - at)
    lean: Tensor | None  # this rank's positions' mean less that of all
    offset: Tensor  # positions' mean less the batch's
    rest: Tensor  # the batch's variance less what ``left`` says along W
    per: Tensor  # 1 / <D, W> with today in D


def answer(by: Sequence[Any], f: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """For yesterday's P, today's E[p], D with today in it, today's own, and b, (C,) each or (B, C) of B batches.

    What is taken back of 'later' is today's; what the positions do not see of it along W goes by D.
    """
    given = By(*by)
    h, d, of_d = _through(given, f)
    apart, lean = given.apart, given.lean
    assert apart is not None  # else no position was looked at
    _, _, back_mean, back_var = f
    own = d * given.at
    today = torch.addcmul(back_mean, own, apart if lean is None else apart + lean, value=-1)
    if lean is not None:
        today = torch.addcmul(today, lean, back_var)
    return [torch.stack([torch.addcmul(h, own, apart), today]), of_d, back_var - own, h + back_mean]


def answer_unseen(by: Sequence[Any], f: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The same where no position was looked at, and today's E[p] is taken to be P: for P, D and b."""
    h, _, of_d = _through(By(*by), f)
    of_b = h + f[2]
    return [of_b.unsqueeze(0), of_d, of_b]


def _through(by: By, f: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What goes by yesterday's P and by today's D, and the latter with what goes back."""
    of_mean, of_var, back_mean, back_var = f
    past = (1 - by.s) * by.through
    h = torch.addcmul(of_mean, by.gap, of_var)
    d = by.var_by * of_var
    if by.mean_by is not None:
        d = torch.addcmul(d, by.mean_by, h)
    d = d * _at_most(past / _positive(1 - by.at))  # yesterday's D is today's, less what was added, over 1 - at
    back = torch.addcmul(by.rest * back_var, by.offset, back_mean, value=-1)
    return h * past, d, torch.addcmul(d, back, by.per)


def _positive(number: Tensor | float) -> Tensor | float:
    return number.clamp_min(1e-30) if isinstance(number, Tensor) else max(number, 1e-30)


def _at_most(ratio: Tensor | float) -> Tensor | float:
    """(1 - s) / (1 - at) where a difference from one has been rounded away."""
    return ratio.clamp_max(TIMES) if isinstance(ratio, Tensor) else ratio
