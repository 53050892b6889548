"""CBN the way of its authors, from its equations: to compare what it costs with, no method of the table.

Lists of past weights W_tau and moments, with d mu_tau / dW and d nu_tau / dW by two calls of torch.autograd.grad in
every forward; mu = E[y], nu = E[y^2] of y = W p. Over a window of k batches, the current one included:

    mu_tau(W_t) = mu_tau + <d mu_tau / dW, W_t - W_tau>,   nu_tau(W_t) likewise, at least mu_tau(W_t)^2
    mu_bar, nu_bar = means over the window, constant but for the current batch's
    out = gamma (y - mu_bar) / sqrt(nu_bar - mu_bar^2 + eps) + beta

The denominator and the floor are those of ``CBN.paper``, which computes the same by closed forms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.convert.pairing import pair
from anybatch.convert.walker import swap
from anybatch.core.affine import per_channel
from anybatch.core.moments import compute_dtype
from anybatch.errors import AnybatchError
from anybatch.layers.cbn import CBN
from anybatch.methods import parse_method

__all__ = ["Released", "ReleasedCBN"]

NAME = "released"


class _Entry(NamedTuple):
    mu: Tensor
    nu: Tensor
    dmu: Tensor
    dnu: Tensor
    weight: Tensor

    def at(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Its moments, carried over to ``weight``."""
        moved = weight - self.weight
        mu, nu = (m + (d * moved).flatten(1).sum(1) for m, d in ((self.mu, self.dmu), (self.nu, self.dnu)))
        return mu, torch.maximum(nu, mu.square())


class ReleasedCBN(nn.Module):
    """A linear map and the norm after it: out of the equations above in training, BatchNorm's in evaluation.

    Args:
        map: with output channels first in its weight, and without a bias.
        norm: the BatchNorm after it, whose parameters and running statistics go on.
        window: k.
        burn_in_steps: training forwards normalised by their own batch alone before the window is used.

    Shape: (N, C_in, *) -> (N, C, *).
    """

    def __init__(self, map: nn.Module, norm: _BatchNorm, window: int = 8, burn_in_steps: int = 0) -> None:
        super().__init__()
        self.map, self.norm, self.window, self.burn_in_steps = map, norm, window, burn_in_steps
        self.past: list[_Entry] = []
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """The map, then the norm."""
        y = self.map(x)
        if not self.training:
            return self.norm(y)  # type: ignore[no-any-return]
        wide = y.to(compute_dtype(y.dtype))
        over = [d for d in range(y.dim()) if d != 1]
        now = wide.mean(over), wide.square().mean(over)
        weight = self.map.weight
        dmu, dnu = (torch.autograd.grad(m.sum(), weight, retain_graph=True)[0] for m in now)  # type: ignore[arg-type]
        mu, nu = (m.detach() for m in now)
        weight = weight.detach().clone()  # type: ignore[operator]
        used = self.past if self.forwards >= self.burn_in_steps else []
        mu_bar, nu_bar = (torch.stack(m).mean(0) for m in zip(now, *(e.at(weight) for e in used), strict=True))
        self._track(mu, nu, y.numel() // len(mu))
        self.past = [_Entry(mu, nu, dmu, dnu, weight), *self.past][: self.window - 1]
        self.forwards += 1
        out: Tensor = (wide - per_channel(mu_bar, y)) * per_channel(
            (nu_bar - mu_bar.square() + self.norm.eps).rsqrt(), y
        )
        if self.norm.affine:
            out = out * per_channel(self.norm.weight, y) + per_channel(self.norm.bias, y)
        return out.to(y.dtype)

    def history(self) -> Iterator[Tensor]:
        """The tensors that are kept from one forward to the next."""
        for entry in self.past:
            yield from entry

    @torch.no_grad()
    def _track(self, mu: Tensor, nu: Tensor, m: int) -> None:
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mu, momentum)
        norm.running_var.lerp_((nu - mu.square()) * (m / max(m - 1, 1)), momentum)


@dataclass(frozen=True)
class Released:
    """The authors' way; options as those of ``CBN.paper``.

    Args:
        window: batches pooled, the current one included.
        burn_in_steps: training forwards of plain BatchNorm at first.
    """

    window: int = 8
    burn_in_steps: int = 0

    def __post_init__(self) -> None:
        self.same()

    @classmethod
    def parse(cls, text: str) -> "Released":
        """From what one types: ``released`` or ``released(window=4)``.

        Raises:
            AnybatchError: an unknown option or a value out of range.
        """
        try:
            paper = parse_method("cbn-paper" + text.strip()[len(NAME) :])
        except AnybatchError as error:
            raise AnybatchError(str(error).replace("cbn-paper", NAME)) from error
        assert isinstance(paper, CBN)
        assert paper.window is not None
        return cls(paper.window, paper.burn_in_steps)

    def same(self) -> CBN:
        """The method of the table that computes the same."""
        return CBN.paper(self.window, self.burn_in_steps)

    def put_into(self, model: nn.Module, example_inputs: Any) -> None:
        """Put a ReleasedCBN in place of every convolution and the BatchNorm after it; where that was is an Identity.

        Raises:
            AnybatchError: no convolution feeds a norm alone.
        """
        norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
        instead: dict[nn.Module, nn.Module] = {}
        for name, pairing in pair(model, norms, example_inputs).items():
            maps = [feed.module for feed in pairing.feeds]
            if len(maps) != 1 or not pairing.exclusive or not _fits(maps[0]):
                reason = pairing.reason or pairing.shared or "its map is no convolution without bias, or not one map"
                raise AnybatchError(f"released: '{name}': {reason}; the authors' way needs a convolution of its own")
            instead[maps[0]] = ReleasedCBN(maps[0], norms[name], self.window, self.burn_in_steps)
            instead[norms[name]] = nn.Identity()
        swap(model, instead)


def _fits(map: nn.Module) -> bool:
    return isinstance(map, nn.Conv1d | nn.Conv2d | nn.Conv3d) and map.bias is None
