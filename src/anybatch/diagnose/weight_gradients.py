"""How the gradients of one layer's weights are spread: their histogram, and how heavy its tails are.

    std = sqrt(E[(g - E[g])^2]),   kurtosis = E[(g - E[g])^4] / std^4 (3 for a normal distribution),   max = max |g|

over all entries g of one weight's gradient. Without normalization the distribution is heavy-tailed, with it it is
concentrated (Bjorck et al., arXiv 1806.02375, their histogram of the middle layer's gradients at initialization).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..core.moments import moments
from ..errors import AnybatchError
from .panels import Panel
from .subject import Passes, Subject
from .watch import maps_of, middle, refuse_unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["WeightGradients", "measure", "panels", "passes", "plot", "said"]


@dataclass(frozen=True)
class WeightGradients:
    """Spread of one weight's gradient.

    Attributes:
        layer: its name.
        edges: (B + 1,) of the histogram's bins, from -max to max.
        counts: (B,).
        std: population.
        kurtosis: 3 for a normal distribution.
        max: largest absolute value.
    """

    layer: str
    edges: Tensor
    counts: Tensor
    std: float
    kurtosis: float
    max: float


def measure(subject: Subject, layer: str | None = None, batch: int = 0, bins: int = 101) -> WeightGradients:
    """Histogram, standard deviation, kurtosis and largest value of the gradient at one linear map's weight.

    Args:
        subject: the model, its batches and loss.
        layer: name of a linear map; by default the middle convolution.
        batch: which of the batches.
        bins: of the histogram.
    """
    model = subject.copy()
    name = middle(model) if layer is None else layer
    maps = maps_of(model)
    refuse_unknown([name], maps)
    with parametrize.cached():  # of a computed weight, the one that is used
        weight = maps[name].weight
        assert isinstance(weight, Tensor)
        if not weight.requires_grad:
            raise AnybatchError(f"diagnose: the weight of '{name}' is not trained; choose another layer")
        loss = subject.loss_of(model, subject.batch(batch))
        g = subject.backward(loss, [weight])[0].double().cpu().flatten()
    now = moments(g[:, None])
    centred = g - now.mean
    limit = float(g.abs().max())
    if not limit < torch.inf:
        raise AnybatchError(f"diagnose: the gradient of '{name}' is not finite on batch {batch}; choose another")
    counts = torch.histc(g, bins, -limit, limit) if limit else torch.zeros(bins, dtype=torch.float64)
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)
    kurtosis = float(centred.pow(4).mean() / now.var.square()) if limit else float("nan")
    return WeightGradients(name, edges, counts, float(now.var.sqrt()), kurtosis, limit)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs."""
    return Passes(forward=1, backward=1)


def panels(found: Mapping[str, WeightGradients]) -> list[Panel]:
    """Histograms in units of their standard deviations, on a logarithmic scale."""
    series = {}
    for name, at in found.items():
        middles = (at.edges[1:] + at.edges[:-1]) / 2 / (at.std or 1.0)
        width = float(at.edges[1] - at.edges[0]) / (at.std or 1.0)
        density = at.counts / at.counts.sum().clamp_min(1) / (width or 1.0)
        series[name] = (middles.tolist(), torch.where(density > 0, density, torch.nan).tolist())
    layer = next(iter(found.values())).layer
    return [Panel(f"density of the gradient of '{layer}'", series, "standard deviations", log="y", steps=True)]


def plot(found: Mapping[str, WeightGradients]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, WeightGradients]) -> str:
    """Spread and tails in words."""
    return "; ".join(
        f"{name}: gradients of '{at.layer}' have standard deviation {at.std:.2g}, kurtosis {at.kurtosis:.1f} (3 is "
        f"normal) and reach {at.max / at.std if at.std else 0:.0f} standard deviations"
        for name, at in found.items()
    )
