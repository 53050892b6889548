"""What breaks when a step diverges: channel means and variances of some layers along one step.

    y_l(f) = output of map l at theta - f a grad L(theta),   f = 0 ... 1
    mean_lc(f), var_lc(f) over the batch and positions, population

Without normalization they explode together, the more the deeper (Bjorck et al., arXiv 1806.02375, their heat maps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.moments import moments
from ..errors import AnybatchError
from . import step_size
from .panels import Heat, Tile
from .subject import Passes, Subject
from .watch import as_channels, maps_of, refuse_unknown, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FRACTIONS", "DivergingStep", "measure", "measure_all", "panels", "passes", "plot", "said"]

FRACTIONS = 20


@dataclass(frozen=True)
class DivergingStep:
    """Moments along a step.

    Attributes:
        step: its size a.
        fractions: (F,) of it, 0 to 1.
        loss: (F,).
        names: of the layers that were looked at.
        mean: by layer, (F, C).
        var: by layer, (F, C).
    """

    step: float
    fractions: Tensor
    loss: Tensor
    names: tuple[str, ...]
    mean: tuple[Tensor, ...]
    var: tuple[Tensor, ...]

    @property
    def growth(self) -> float:
        """The last layer's mean channel variance at the end of the step over that at its start."""
        return float(self.var[-1][-1].mean() / self.var[-1][0].mean())


def measure(
    subject: Subject,
    batch: int = 0,
    step: float | None = None,
    layers: Sequence[str] | None = None,
    fractions: int = FRACTIONS,
) -> DivergingStep:
    """Channel means and variances of some maps' outputs along one gradient step, in training mode, on one batch.

    Args:
        subject: the model, its batches and loss.
        batch: which of them.
        step: its size a; by default the smallest that diverges on the grid of step_size, or the grid's last.
        layers: names of linear maps; by default the first, the middle and the last convolution.
        fractions: of the step, besides 0.
    """
    model = subject.copy()
    maps = maps_of(model)
    names = (layers,) if isinstance(layers, str) else tuple(layers or ())
    refuse_unknown(names, maps)
    if step is None:
        step = step_size.measure(subject, batch).smallest_diverging or step_size.GRID[-1]
    ran: dict[str, nn.Module] = {}

    def runs(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        ran[name] = module

    with watching(maps, runs):
        _, after = step_size.along_gradient(subject, model, batch)
    names = names or tuple(_default(ran or maps))
    means: dict[str, list[Tensor]] = {name: [] for name in names}
    variances: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        now = moments(as_channels(module, y).double())
        means[name].append(now.mean.cpu())
        variances[name].append(now.var.cpu())

    at = torch.linspace(0, 1, fractions + 1, dtype=torch.float64)
    with watching({name: maps[name] for name in names}, see):
        losses = [after(f * step) for f in at.tolist()]
    by_name = [tuple(_by_step(seen[name], len(at), name) for name in names) for seen in (means, variances)]
    return DivergingStep(step, at, torch.tensor(losses, dtype=torch.float64), names, *by_name)


def measure_all(subjects: Mapping[str, Subject]) -> dict[str, DivergingStep]:
    """Every subject along a step of the same size: the smallest that makes one of them diverge."""
    sizes = [step_size.measure(subject).smallest_diverging for subject in subjects.values()]
    step = min((size for size in sizes if size is not None), default=step_size.GRID[-1])
    return {name: measure(subject, step=step) for name, subject in subjects.items()}


def passes(subject: Subject) -> Passes:
    """What a subject costs in :func:`measure_all`."""
    return step_size.passes(subject) + Passes(forward=2 + FRACTIONS, backward=1)


def _default(maps: Mapping[str, nn.Module]) -> list[str]:
    convolutions = [name for name, module in maps.items() if not isinstance(module, nn.Linear)] or list(maps)
    return list(dict.fromkeys([convolutions[0], convolutions[len(convolutions) // 2], convolutions[-1]]))


def _by_step(seen: list[Tensor], forwards: int, name: str) -> Tensor:
    """(F, C); a map that a forward calls several times has the mean of its calls."""
    if not seen:
        raise AnybatchError(f"diagnose: '{name}' did not run; choose other layers")
    return torch.stack(seen).view(forwards, -1, seen[0].numel()).mean(1)


def panels(found: Mapping[str, DivergingStep]) -> list[Heat]:
    """A heat map a layer and subject, channels from left to right, the step from top to bottom: log variance."""
    tiles = [
        Tile(layer, along.var[place].clamp_min(1e-30).log10().tolist(), name)
        for name, along in found.items()
        for place, layer in enumerate(along.names)
    ]
    columns = max(len(along.names) for along in found.values())
    return [Heat(tiles, columns, "log10 channel variance", "channel", "share of the step", (1.0, 0.0))]


def plot(found: Mapping[str, DivergingStep]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, DivergingStep]) -> str:
    """How the last layer's variance changes, in words."""
    return "; ".join(
        f"{name}: along a step of {along.step:.2g} the channel variance of '{along.names[-1]}' changes by a factor of "
        f"{along.growth:.3g}, the loss from {float(along.loss[0]):.3g} to {float(along.loss[-1]):.3g}"
        for name, along in found.items()
    )
