"""A larger batch as so many rows at a time, for a Cross-Iteration BatchNorm.

One after another, each as a batch of its own; or all of them at once (core/causal.py), to the same result and several
times as fast where parts are small. At once go the parts of an exponential history that samples positions, or needs
none, on a CPU, in float32 or float64, without ranks, of two values a channel or more, all finite.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..core.moments import Moments, compute_dtype
from ..core.passes import dense, dense_like
from ..core.pooled import normalise_pooled
from ..core.tensors import at_hand
from ..kernels.choose import passes_for
from .exponential import Exponential
from .feed import Feed, map_of

if TYPE_CHECKING:
    from .cbn import CrossIterationBatchNorm

__all__ = ["can_go_at_once", "normalise_parts"]


def normalise_parts(
    norm: "CrossIterationBatchNorm",
    y: Tensor,
    size: int,
    index: int,
    feed: Feed | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Normalise y (N, C, *), ``size`` rows at a time."""

    def part(i: int, j: int) -> tuple[Tensor, Feed | None]:
        return y[i:j], feed and feed._replace(x=feed.x[i:j])

    begin, out = 0, list[Tensor]()
    whole = len(y) // size * size
    if whole > size and _at_once(norm, y, size):
        its, its_run = part(0, whole)
        found = _together(norm, its, size, index, its_run if norm.compensates else None, weight, bias)
        if found is not None:
            begin, out = whole, [found]
    for i in range(begin, len(y), size):
        rows, its_run = part(i, i + size)
        out.append(norm.normalise_one(rows, index, its_run, weight, bias))
    return torch.cat(out) if len(out) > 1 else out[0]


def can_go_at_once(kind: str, positions: int | None, compensates: bool) -> bool:
    """Whether some input's parts do: the history is exponential, and reads few positions, or none."""
    return kind == "exponential" and (positions is not None or not compensates)


def _at_once(norm: "CrossIterationBatchNorm", y: Tensor, size: int) -> bool:
    values = size * (y[0, 0].numel() if y.dim() > 2 else 1)
    here = norm.group is None and at_hand(y.detach()) and y.dtype == compute_dtype(y.dtype)
    return can_go_at_once(norm.kind, norm.positions, norm.compensates) and here and values > 1


def _together(
    norm: "CrossIterationBatchNorm",
    y: Tensor,
    size: int,
    index: int,
    feed: Feed | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """All parts at once, each channel of each a channel; None: each is its own case."""
    parts = len(y) // size
    passes, replay = passes_for(y), norm._replay
    folded = y.reshape(parts, size, *y.shape[1:]).transpose(0, 1).flatten(1, 2)  # (size, parts * C, *)
    own = passes.moments(folded.detach())
    history, map = norm.history_of(index).like(own.mean), map_of(feed, y.shape[1], own.mean)
    assert isinstance(history, Exponential)
    if replay.is_second_run():
        found = replay.recall(own.mean, index, required=False)
    else:
        replay.tidy()
        now = Moments(own.mean.view(parts, -1), own.var.view(parts, -1), own.size)
        rule = norm.rule(1 - norm.share(size))
        with _disable_current_modes():  # of what a selective checkpoint keeps, a second run asks for none
            found = history.take_each(y.detach(), now, feed, *map.held(), rule, norm.burn_in_steps)
            if found is not None:
                norm.take_into_running_(now, size)
        if found is not None:
            replay.remember(own.mean, index, found)
    if found is None:
        return None
    pooled, response = found
    weight, bias = (p if p is None else p.repeat(parts) for p in (weight, bias))
    averages = None if response is None else norm.averages(history, size)
    args = own, pooled, map, response, averages, None, replay.backward_begins, passes
    out = normalise_pooled(folded, weight, bias, norm.eps, *args)
    if size == 1:  # no view: a ReLU may write to it
        out = torch.ops.aten._unsafe_view(out, list(y.shape))
    else:
        out = out.reshape(size, parts, *y.shape[1:]).transpose(0, 1).flatten(0, 1)
    return dense_like(out, dense(y.detach())[1])
