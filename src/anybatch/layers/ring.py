"""A history of the last batches, each kept as it was: one preallocated ring.

One slot of the ring is always free; a batch is written there and only a batch with finite moments moves the ring on, so
a bad one costs no old entry. Letters: T slots (= window), C channels, G groups, K values of a patch.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.moments import Moments
from ..core.pooled import Pooled, Response, Rule, spread
from ..core.ranks import Whole
from ..core.sampling import everywhere
from ..core.taylor import Entries, pool_entries
from ..errors import AnybatchError
from .feed import Feed
from .history import History, Today

__all__ = ["Ring"]


class Ring(History):
    """The last window - 1 batches of one norm behind one map.

    State: count (T,), scalars (4, C, T): mean, var, mean_at, var_at of :class:`Entries`, patch (G, T, K),
    covariance (C, T, K), slot (1,) int64: the free one, and what every history has.
    """

    fields: ClassVar[tuple[str, ...]] = ("count", "scalars", "patch", "covariance", "slot", *History.fields)

    @torch.inference_mode(False)  # a forward in inference mode must not make a ring that training cannot write
    def __init__(self, window: int, channels: int, groups: int, k: int, like: Tensor) -> None:
        zeros = like.new_zeros
        self.count = zeros(window)
        self.scalars = zeros(4, channels, window)
        self.patch = zeros(groups, window, k)
        self.covariance = zeros(channels, window, k)
        self.slot = zeros(1, dtype=torch.int64)
        self.start(channels, like)

    def entries(self) -> Entries:
        """The ring as the core reads it; empty slots have size 0."""
        mean, var, mean_at, var_at = self.scalars.unbind(0)
        return Entries(self.count, mean, var, mean_at, var_at, self.patch, self.covariance)

    def observe(self, y: Tensor, own: Moments, now: Moments, whole: Whole, feed: Feed | None) -> tuple[Tensor, Tensor]:
        """E[p] (G, K) and E[(y - mean) p] (C, K) over all positions, of which the ranks' add up to the batch's."""
        if feed is None or not y.numel():
            return torch.zeros_like(self.patch[:, 0]), torch.zeros_like(self.covariance[:, 0])
        with torch.no_grad():
            seen = everywhere(feed.x, y, own.mean, own.var, feed.geometry, feed.weight)
            assert seen.covariance is not None
            if whole.apart is None or whole.share is None:
                return seen.patch, seen.covariance
            return seen.patch * whole.share, (seen.covariance + spread(seen.patch, whole.apart)) * whole.share

    @torch.no_grad()
    def pool(self, today: Today, seen: Any, rule: Rule) -> tuple[Pooled, Response | None, Tensor | bool, Any]:
        """See :func:`anybatch.core.taylor.pool_entries`."""
        now, (patch, covariance) = today.now, seen
        pooled, response, at = pool_entries(
            self.entries(), now, patch, covariance, today.rows, today.bias, rule, today.used
        )
        sums = (now.mean + now.var + at.mean[:, 0] + at.var[:, 0]).sum()
        if torch.compiler.is_compiling() and response is not None:
            # Needed by the forward too, or a compiler computes them after the history has changed, in the backward.
            sums = sums + torch.stack([t.sum() for t in (*response, *response.by) if isinstance(t, Tensor)]).sum()
        ok = torch.isfinite(sums)
        if isinstance(now.size, Tensor):
            ok = ok & (now.size > 0)
        ok = ok if today.take is None else ok & today.take
        return pooled, response, ok, (at.mean[:, 0], at.var[:, 0], patch, covariance)

    def push_(self, today: Today, ok: Tensor | bool, new: Any) -> None:
        """Write a batch into the free slot, and free the oldest if ``ok``."""
        ok = torch.as_tensor(ok)
        # A free slot is multiplied by zero, so what it holds must be finite, squared too.
        now, (mean_at, var_at, patch, covariance) = today.now, new
        scalars = torch.stack([now.mean, now.var, mean_at, var_at])
        self.scalars.index_copy_(2, self.slot, torch.where(ok, scalars, 0.0).unsqueeze(2))
        if patch.numel():
            self.patch.index_copy_(1, self.slot, torch.where(ok, patch, 0.0).unsqueeze(1))
            self.covariance.index_copy_(1, self.slot, torch.where(ok, covariance, 0.0).unsqueeze(1))
        if isinstance(now.size, Tensor):  # index_fill_ would wait for its value
            self.count.index_copy_(0, self.slot, now.size.to(self.count.dtype).view(1))
        else:
            self.count.index_fill_(0, self.slot, float(now.size))
        self.slot.add_(ok).remainder_(self.count.shape[0])
        self.count.index_fill_(0, self.slot, 0.0)
        self.forwards.add_(ok)

    def take(self, state: Any, where: str) -> History:
        """As every history; the free slot must be in the ring."""
        super().take(state, where)
        if not 0 <= int(self.slot) < len(self.count):
            raise AnybatchError(f"history of {where}: slot {int(self.slot)} of {len(self.count)}; save it anew")
        return self
