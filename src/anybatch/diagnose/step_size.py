"""How far one step may go: the loss after a step along the gradient, on the same batch, against the step's size.

    ratio(a) = L(theta - a grad L(theta)) / L(theta)

With normalization the ratio falls over a wide range of a; without, it explodes early (Bjorck et al., arXiv 1806.02375,
their figure of the loss landscape along the gradient). Dropout and the like draw the same at every a.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import AnybatchError
from .copies import rewinder
from .panels import Panel
from .subject import Passes, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DIVERGED", "GRID", "StepSizes", "along_gradient", "measure", "panels", "passes", "plot", "said"]

GRID = tuple(10 ** (k / 4) for k in range(-20, 9))  # 1e-5 to 100, four a decade
DIVERGED = 1e3  # the loss, or its ratio, beyond which a step counts as diverged


@dataclass(frozen=True)
class StepSizes:
    """Relative losses along the gradient.

    Attributes:
        steps: (S,) sizes a, ascending.
        ratio: (S,) L(theta - a grad) / L(theta); inf where it is not finite.
        loss: L(theta).
    """

    steps: Tensor
    ratio: Tensor
    loss: float

    @property
    def largest_lowering(self) -> float:
        """The largest a that lowers the loss; 0 if none does."""
        lower = self.steps[self.ratio < 1]
        return float(lower.max()) if lower.numel() else 0.0

    @property
    def smallest_diverging(self) -> float | None:
        """The smallest a at which the loss is more than 1e3 times what it was, or not finite; None if none is."""
        beyond = self.steps[~(self.ratio <= DIVERGED)]
        return float(beyond.min()) if beyond.numel() else None


def along_gradient(subject: Subject, model: nn.Module, batch: int) -> tuple[float, Callable[[float], float]]:
    """The loss of a batch, and what it is after a step of some size along its gradient, of everything else as it was.

    One forward and one backward pass, and a forward each time.
    """
    rewind, taken = rewinder(model), subject.batch(batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = subject.loss_of(model, taken)
    gradient = subject.backward(loss, parameters)
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def after(step: float) -> float:
        for p, at, g in zip(parameters, start, gradient, strict=True):
            p.copy_(at - step * g)
        rewind()
        return float(subject.loss_of(model, taken))

    return float(loss.detach()), after


def measure(subject: Subject, batch: int = 0, steps: Sequence[float] = GRID) -> StepSizes:
    """The loss ratio over a grid of step sizes, in training mode, on one batch.

    Args:
        subject: the model, its batches and loss.
        batch: which of them.
        steps: sizes a, in units of the plain gradient.
    """
    loss, after = along_gradient(subject, subject.copy(), batch)
    if not loss > 0:
        raise AnybatchError(f"diagnose: the loss is {loss:g}, of which a ratio says nothing; give one above zero")
    steps = sorted(steps)
    if not steps or steps[0] < 0:
        raise AnybatchError(f"diagnose: steps={steps}; give sizes of at least zero")
    ratio = torch.tensor([after(a) for a in steps], dtype=torch.float64) / loss
    return StepSizes(torch.tensor(steps, dtype=torch.float64), ratio.nan_to_num(nan=torch.inf, neginf=torch.inf), loss)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs with its default grid."""
    return Passes(forward=1 + len(GRID), backward=1)


def panels(found: Mapping[str, StepSizes]) -> list[Panel]:
    """The ratio against the step, both logarithmic, cut at what counts as diverged."""
    series = {name: (at.steps.tolist(), at.ratio.clamp(1e-3, 10 * DIVERGED).tolist()) for name, at in found.items()}
    return [Panel("loss after the step / loss before", series, "step size", log="xy", level=1.0)]


def plot(found: Mapping[str, StepSizes]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, StepSizes]) -> str:
    """The largest step that lowers the loss, in words."""
    return "; ".join(
        f"{name}: the loss falls at steps of up to {at.largest_lowering:.2g}"
        + (f" and diverges from {at.smallest_diverging:.2g} on" if at.smallest_diverging is not None else "")
        for name, at in found.items()
    )
