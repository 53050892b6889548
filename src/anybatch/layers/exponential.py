"""A history of all past batches with exponentially falling shares, in the memory of one (core/exponential.py).

What a graph that waits for its backward holds of the history is left alone: then the next forward writes elsewhere.
Letters: C channels, G groups, K values of a patch.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.exponential import Past, advance
from ..core.moments import Moments
from ..core.pooled import Pooled, Response, Rule
from ..core.ranks import Whole
from ..core.sampling import Seen, everywhere, nothing, sampled
from .feed import Feed
from .history import History, Today

__all__ = ["Exponential"]


class Exponential(History):
    """All batches of one norm behind one map so far, pooled.

    Args:
        samples: output positions that are looked at, of every batch; None: all.
        stored: dtype of the covariance, None: that of the statistics.

    State: count (), scalars (2, 2, C): means and variances of :class:`Past`, patch (G, K), covariance (C, K), and
    what every history has.
    """

    fields: ClassVar[tuple[str, ...]] = ("count", "scalars", "patch", "covariance", *History.fields)

    @torch.inference_mode(False)  # a forward in inference mode must not make a history that training cannot write
    def __init__(
        self, samples: int | None, stored: torch.dtype | None, channels: int, groups: int, k: int, like: Tensor
    ) -> None:
        self.samples = samples
        self.count = like.new_zeros(())
        self.scalars = like.new_zeros(2, 2, channels)
        self.patch = like.new_zeros(groups, k)
        self.covariance = like.new_zeros(channels, k, dtype=stored)
        self._lent: Any = None  # a weak reference to what the last graph got of the covariance
        self.start(channels, like)

    def observe(self, y: Tensor, own: Moments, now: Moments, whole: Whole, feed: Feed | None) -> Seen:
        """Outputs and patches of some positions, relative to the whole batch's mean."""
        if feed is None or not y.numel():
            return nothing(self.patch, self.scalars.shape[2])
        with torch.no_grad():
            if self.samples is not None:
                return sampled(feed.x, y, now.mean, feed.geometry, self.samples, self.forwards)
            seen = everywhere(feed.x, y, own.mean, own.var, feed.geometry, feed.weight)
            return seen if whole.apart is None else seen._replace(offset=whole.apart)

    @torch.no_grad()
    def pool(self, today: Today, seen: Any, rule: Rule) -> tuple[Pooled, Response | None, Tensor | bool, Any]:
        """See :func:`anybatch.core.exponential.advance`; the covariance may be changed in place already."""
        compiling, mapped = torch.compiler.is_compiling(), today.rows.shape[1]
        # Of what it need not touch, and of what it is given back as it was, a compiler loses track in a checkpoint.
        covariance = today.rows if compiling and not mapped else self.covariance
        past = Past(self.count, self.scalars[0], self.scalars[1], self.patch, covariance)
        held = None if compiling or self._lent is None else self._lent()
        free = not compiling and held is None
        rest = today.used, today.part, today.take, free
        pooled, response, new, ok = advance(past, today.now, seen, today.rows, today.bias, rule, *rest)
        if compiling:
            new = new._replace(covariance=new.covariance.clone())
        elif response is not None:
            # What was not changed stays with the graph that has it already.
            lent = held if held is not None and new.covariance is self.covariance else new.covariance.detach()
            self._lent = weakref.ref(lent)
            response = response._replace(covariance=lent)
        return pooled, response, ok, new

    def push_(self, today: Today, ok: Tensor | bool, new: Any) -> None:
        """Keep the new past; where the batch was not ``ok``, it is the old one."""
        tensors = new.size, torch.stack([new.means, new.variances]), new.patch, new.covariance
        for field, tensor in zip(self.fields, tensors, strict=False):
            if not torch.compiler.is_compiling():
                with torch.inference_mode(False):  # what is made in inference mode training cannot write
                    setattr(self, field, tensor.clone() if tensor.is_inference() else tensor)
            elif tensor.numel():  # of no dimension and in float64 it is a number to a compiler, which drops the copy
                getattr(self, field).view(-1).copy_(tensor.view(-1))
        self.forwards.add_(ok)
