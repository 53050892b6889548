"""How much of a weight's gradient cancels: the terms it is the sum of against that sum.

    dL/dW_oij = sum_{b,p} d_bp,   d_bp = dL/dy_bop x_b,i,p+j       over examples b and positions p
    A = E_oij[ sum_{b,p} |d_bp| ],   B = E_oij[ |sum_{b,p} d_bp| ],   ratio B / A in [0, 1]

Without normalization B/A is near 1: all terms pull the same way; with it they cancel (Bjorck et al., arXiv 1806.02375,
their comparison of A and B at initialization). Since |d_bp| = |dL/dy| |x|, A is a weight gradient too, of absolute
values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.linear_map import LinearMap
from ..errors import AnybatchError
from .panels import Panel
from .subject import Passes, Subject
from .watch import as_channels, maps_of, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cancellation", "measure", "panels", "passes", "plot", "said"]


@dataclass(frozen=True)
class Cancellation:
    """Terms and sums of the gradients at the maps' weights.

    Attributes:
        names: of the maps, in the model's order; a map that no gradient reaches is left out.
        a: (L,) mean over the weight of the sum of absolute terms.
        b: (L,) mean over the weight of the absolute sum.
    """

    names: tuple[str, ...]
    a: Tensor
    b: Tensor

    @property
    def ratio(self) -> Tensor:
        """B / A, (L,)."""
        return self.b / self.a


def measure(subject: Subject, batch: int = 0) -> Cancellation:
    """A and B of every linear map's weight, over examples, positions and calls.

    Args:
        subject: the model, its batches and loss.
        batch: which of them.
    """
    model = subject.copy()
    maps = maps_of(model)
    terms: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        if not y.requires_grad:
            return None
        if y._is_view():  # of Linear on sequences; changed in place, a view loses its hooks
            y = y.clone()
        weight, geometry = module.weight, LinearMap.of(module)
        assert isinstance(weight, Tensor)
        assert geometry is not None
        x = x.detach()

        def arrived(g: Tensor) -> None:
            flat = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x
            cotangent = as_channels(module, g).double()
            count = cotangent.numel() // cotangent.shape[1]
            for into, p, q in ((terms, flat.double().abs(), cotangent.abs()), (sums, flat.double(), cotangent)):
                into[name] = into.get(name, 0) + count * geometry.covariance(p, q, weight)

        y.register_hook(arrived)  # type: ignore[no-untyped-call] # of y as it is now: what follows may change it in place
        return y

    with watching(maps, see):
        loss = subject.loss_of(model, subject.batch(batch))
    subject.backward(loss, [p for p in model.parameters() if p.requires_grad])
    names = tuple(name for name in maps if name in terms)
    if not names:
        raise AnybatchError("diagnose: no gradient reaches the output of a linear map; check requires_grad")
    a = torch.stack([terms[name].mean().cpu() for name in names])
    b = torch.stack([sums[name].abs().mean().cpu() for name in names])
    return Cancellation(names, a, b)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs; its backward takes about twice as long as another."""
    return Passes(forward=1, backward=1)


def panels(found: Mapping[str, Cancellation]) -> list[Panel]:
    """A, B and their ratio against the number of the map."""

    def series(of: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: (list(range(1, len(at.names) + 1)), getattr(at, of).tolist()) for name, at in found.items()}

    return [
        Panel("B / A", series("ratio"), "linear map, in order", log="y"),
        Panel("A: sum of absolute terms", series("a"), "linear map, in order", log="y"),
    ]


def plot(found: Mapping[str, Cancellation]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, Cancellation]) -> str:
    """The ratio in the middle, in words."""
    return "; ".join(
        f"{name}: {100 * (1 - float(at.ratio.median())):.0f} % of the terms of a weight's gradient cancel (median map)"
        for name, at in found.items()
    )
