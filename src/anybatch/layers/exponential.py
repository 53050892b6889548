"""A history of all past batches with exponentially falling shares, in the memory of one (core/exponential.py).

What a graph that waits for its backward holds of the history is left alone: then the next forward writes elsewhere.
Letters: C channels, G groups, K values of a patch.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.causal import advance_each
from ..core.exponential import Past, advance
from ..core.moments import Moments
from ..core.pooled import Pooled, Response, Rule
from ..core.ranks import Whole
from ..core.sampling import (
    Seen,
    SeenOfEach,
    enough,
    everywhere,
    looks,
    nothing,
    nothing_of_each,
    sampled,
    sampled_of_each,
)
from ..core.tensors import at_hand
from .feed import Feed
from .history import History, Today

__all__ = ["Exponential"]


class Exponential(History):
    """All batches of one norm behind one map so far, pooled.

    Args:
        samples: output positions that are looked at, of a batch, at least; None: all.
        refresh: batches from one that is looked at to the next.
        stored: dtype of the covariance, None: that of the statistics.

    State: count (2,), scalars (5, C): sizes, then mean, var, mean_at, var_at, per of :class:`Past`, patch (G, K),
    covariance (C, K), and what every history has.
    """

    fields: ClassVar[tuple[str, ...]] = ("count", "scalars", "patch", "covariance", *History.fields)

    @torch.inference_mode(False)  # a forward in inference mode must not make a history that training cannot write
    def __init__(
        self,
        samples: int | None,
        refresh: int,
        stored: torch.dtype | None,
        channels: int,
        groups: int,
        k: int,
        like: Tensor,
    ) -> None:
        self.samples, self.refresh = samples, refresh
        self.count = like.new_zeros(2)
        self.scalars = like.new_zeros(5, channels)
        self.patch = like.new_zeros(groups, k)
        self.covariance = like.new_zeros(channels, k, dtype=stored)
        self._lent: Any = None  # a weak reference to what the last graph got of the covariance
        self.start(channels, like)

    def observe(self, y: Tensor, own: Moments, now: Moments, whole: Whole, feed: Feed | None) -> Seen | None:
        """Outputs and patches of some positions, relative to the whole batch's mean; None if they need no look."""
        if feed is None:
            return None
        number, looked = self._look()
        if looked is False:
            return None
        if not y.numel():
            return nothing(self.patch, self.scalars.shape[1])._replace(looked=looked)
        with torch.no_grad():
            if self.samples is not None:
                samples = enough(self.samples, tuple(y.shape[2:]))
                seen = sampled(feed.x, y, now.mean, feed.geometry, samples, number)
            else:
                seen = everywhere(feed.x, y, own.mean, own.var, feed.geometry, feed.weight)
                seen = seen if whole.apart is None else seen._replace(offset=whole.apart)
        return seen._replace(looked=looked)

    def _look(self) -> tuple[Tensor, Tensor | bool]:
        """How many batches were looked at, and whether this one is to be; on other devices it is, and may not count."""
        if self.refresh == 1:
            return self.forwards, True
        if at_hand(self.forwards) and not looks(int(self.forwards), self.refresh)[1]:
            return self.forwards, False
        number, looked = looks(self.forwards, self.refresh)
        return number, at_hand(number) or looked

    def like(self, tensor: Tensor) -> History:
        """As every history; what a graph has of the covariance is none of the one that has moved."""
        before = self.covariance
        super().like(tensor)
        self._lent = self._lent if self.covariance is before else None
        return self

    @torch.no_grad()
    def pool(self, today: Today, seen: Any, rule: Rule) -> tuple[Pooled, Response | None, Tensor | bool, Any]:
        """See :func:`anybatch.core.exponential.advance`; the covariance may be changed in place already."""
        compiling = torch.compiler.is_compiling()
        # Of what it need not touch, and of what it is given back as it was, a compiler loses track in a checkpoint.
        untouched = compiling and not today.rows.shape[1]
        patch, covariance = (today.rows, today.rows) if untouched else (self.patch, self.covariance)
        past = Past._make((self.count, *self.scalars.unbind(), patch, covariance))
        held = None if compiling or self._lent is None else self._lent()
        free = not compiling and held is None
        rest = today.used, today.part, today.take, free
        pooled, response, new, ok = advance(past, today.now, seen, today.rows, today.bias, rule, *rest)
        if compiling:
            new = new._replace(patch=new.patch.clone(), covariance=new.covariance.clone())
        elif response is not None:
            # What was not changed stays with the graph that has it already; one in inference mode has none.
            same = held is not None and new.covariance is self.covariance and not held.is_inference()
            lent: Any = held if same else new.covariance.detach()
            self._lent = weakref.ref(lent)
            response = response._replace(covariance=lent)
        return pooled, response, ok, new

    @torch.no_grad()
    def take_each(
        self, y: Tensor, now: Moments, feed: Feed | None, rows: Tensor, bias: Tensor | None, rule: Rule, alone: int
    ) -> tuple[Pooled, Response | None] | None:
        """Pool some batches of one size, one after another, and take them in.

        None, and nothing, if one of them is not finite: each is its own case then.

        Args:
            y: their outputs (B n, C, *), detached.
            now: their moments (B, C).
            feed: the map's run; None where nothing is compensated.
            rows: W (C, K), detached.
            bias: b (C,), detached.
            rule: how, for each of them.
            alone: forwards of this history that are normalised by their own batch alone, from its first one on.
        """
        seen = None if feed is None else self._observe_each(y, now, feed)
        past = Past._make((self.count, *self.scalars.unbind(), self.patch, self.covariance))
        alone = min(len(now.mean), max(0, alone - int(self.forwards))) if alone else 0
        found = advance_each(past, now, seen, rows, bias, rule, alone)
        if found is None:
            return None
        pooled, response, new = found
        self._keep(new)
        self._lent = None  # the graph has what was before
        self.forwards.add_(len(now.mean))
        return pooled, response

    def _observe_each(self, y: Tensor, now: Moments, feed: Feed) -> SeenOfEach:
        assert self.samples is not None
        first, numbers, which = int(self.forwards), [], []
        for t in range(len(now.mean)):
            number, looked = looks(first + t, self.refresh)
            if looked:
                numbers.append(number)
                which.append(t)
        if not which:
            return nothing_of_each(self.patch, now.mean.shape[1])
        each = torch.tensor(which, dtype=torch.int64, device=y.device)
        samples = enough(self.samples, tuple(y.shape[2:]))
        return sampled_of_each(feed.x, y, now.mean, feed.geometry, samples, numbers, each)

    def push_(self, today: Today, ok: Tensor | bool, new: Any) -> None:
        """Keep the new past; where the batch was not ``ok``, it is the old one."""
        if ok is False:
            return
        self._keep(new)
        self.forwards.add_(ok)

    def _keep(self, new: Past) -> None:
        sizes, *scalars, patch, covariance = new
        tensors = sizes, torch.stack(scalars), patch, covariance
        for field, tensor in zip(self.fields, tensors, strict=False):
            if not torch.compiler.is_compiling():
                setattr(self, field, _writable(tensor) if tensor.is_inference() else tensor)
            elif tensor.numel():  # of no dimension and in float64 it is a number to a compiler, which drops the copy
                getattr(self, field).view(-1).copy_(tensor.view(-1))


@torch.inference_mode(False)
def _writable(tensor: Tensor) -> Tensor:
    """A copy that training can write to, of what was made in inference mode."""
    return tensor.clone()
