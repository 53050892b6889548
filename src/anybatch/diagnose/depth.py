"""Moments against depth: mean |channel mean| and mean channel variance of what each linear map puts out.

    mean_l = 1/C sum_c |E[y_c]|,   var_l = 1/C sum_c E[(y_c - E[y_c])^2]      E over the batch and positions, population

At initialization they grow from layer to layer in a network without normalization, exponentially in a deep one
(Bjorck et al., arXiv 1806.02375, their figure of moments against depth).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.moments import moments
from ..errors import AnybatchError
from .panels import Panel
from .subject import Passes, Subject
from .watch import as_channels, maps_of, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Depth", "measure", "panels", "passes", "plot", "said"]


@dataclass(frozen=True)
class Depth:
    """Moments of the maps' outputs, in the order of their calls (a map called twice is there twice).

    Attributes:
        names: of the maps.
        mean: (L,) mean over channels of the absolute channel mean.
        var: (L,) mean over channels of the channel variance.
    """

    names: tuple[str, ...]
    mean: Tensor
    var: Tensor

    @property
    def growth(self) -> float:
        """Variance of the last map's output over the first one's."""
        return float(self.var[-1] / self.var[0])


def measure(subject: Subject, batch: int = 0) -> Depth:
    """Mean |channel mean| and channel variance of every map's output, over (N, *), in one training forward.

    Args:
        subject: the model and its batches.
        batch: which of them.
    """
    model = subject.copy()
    names: list[str] = []
    found: list[tuple[Tensor, Tensor]] = []

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        now = moments(as_channels(module, y).double())
        if int(now.size) < 2:
            return  # one value a channel has no variance
        names.append(name)
        found.append((now.mean.abs().mean().cpu(), now.var.mean().cpu()))

    with torch.no_grad(), watching(maps_of(model), see):
        subject.output(model, subject.batch(batch))
    if not found:
        raise AnybatchError(
            "diagnose: no linear map ran as a module and put out more than one value a channel; give larger batches"
        )
    means, variances = (torch.stack(values) for values in zip(*found, strict=True))
    return Depth(tuple(names), means, variances)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs."""
    return Passes(forward=1)


def panels(found: Mapping[str, Depth]) -> list[Panel]:
    """Both against the number of the map, on logarithmic scales."""

    def series(of: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            name: (list(range(1, len(depth.names) + 1)), getattr(depth, of).tolist()) for name, depth in found.items()
        }

    return [
        Panel("mean |channel mean|", series("mean"), "linear map, in order", log="y"),
        Panel("channel variance", series("var"), "linear map, in order", log="y"),
    ]


def plot(found: Mapping[str, Depth]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, Depth]) -> str:
    """The growth of the variance in words."""
    return "; ".join(
        f"{name}: the variance of what the maps put out changes by a factor of {depth.growth:.3g} "
        f"from the first to the last of {len(depth.names)}"
        for name, depth in found.items()
    )
