"""Which learning rates a network can be trained at: what some steps of SGD come to, against the rate.

    theta <- theta - a v,   v <- momentum v + grad L(theta)      a fixed, over the batches in turn
    diverged: a loss is not finite or above 1e3; largest stable: the largest rate below the first that diverges

With normalization much larger rates are stable, and the best results come with large ones (Bjorck et al., arXiv
1806.02375, their figures of accuracy against learning rate). Final losses are those of the last quarter of the steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AnybatchError
from .panels import Panel
from .step_size import DIVERGED
from .subject import Passes, Subject, target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RATES", "STEPS", "LearningRates", "accuracy", "measure", "panels", "passes", "plot", "said"]

RATES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
STEPS = 40


@dataclass(frozen=True)
class LearningRates:
    """What training came to at each rate.

    Attributes:
        rates: (R,) ascending.
        curves: (R, T) the loss at every step; nan after it diverged.
        loss: (R,) mean loss of the last quarter of the steps; nan where it diverged.
        accuracy: (R,) on the training batches in those steps, percent; nan where it diverged or the model is no
            classifier.
        test: (R,) accuracy in evaluation mode on the batches kept apart, percent; nan likewise, or without any.
    """

    rates: Tensor
    curves: Tensor
    loss: Tensor
    accuracy: Tensor
    test: Tensor

    @property
    def diverged(self) -> Tensor:
        """(R,) bool."""
        return self.loss.isnan()

    @property
    def largest_stable(self) -> float:
        """The largest rate below the first that diverges; 0 if all do."""
        stable = int((~self.diverged).to(torch.int64).cumprod(0).sum())
        return float(self.rates[stable - 1]) if stable else 0.0

    @property
    def best(self) -> float:
        """The rate with the lowest final loss; nan if all diverge."""
        return (
            float("nan") if bool(self.diverged.all()) else float(self.rates[self.loss.nan_to_num(torch.inf).argmin()])
        )


def accuracy(output: Any, target: Any) -> float:
    """Percent of examples whose largest output (N, K) is their class (N,); nan for what is no classification."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.dim() != 2 or target.dim() != 1:
        return math.nan
    if target.is_floating_point() or len(output) != len(target):
        return math.nan
    return 100 * float((output.argmax(1) == target).double().mean())


def measure(
    subject: Subject,
    rates: Sequence[float] = RATES,
    steps: int = STEPS,
    momentum: float = 0.9,
    test: Sequence[Any] = (),
) -> LearningRates:
    """Train copies with SGD at each rate, for some steps over the subject's batches in turn.

    Args:
        subject: the model, its batches and loss.
        rates: learning rates.
        steps: of SGD at each.
        momentum: torch's.
        test: batches to evaluate on at the end.
    """
    rates = sorted(rates)
    if not rates or rates[0] < 0 or steps < 1:
        raise AnybatchError(f"diagnose: rates={rates}, steps={steps}; give rates from zero on, and a step")
    runs = [_train(subject, rate, steps, momentum, test) for rate in rates]
    columns = (torch.tensor(list(column), dtype=torch.float64) for column in zip(*runs, strict=True))
    return LearningRates(torch.tensor(rates, dtype=torch.float64), *columns)


def _train(
    subject: Subject, rate: float, steps: int, momentum: float, test: Sequence[Any]
) -> tuple[list[float], float, float, float]:
    """Losses, final loss, final accuracy, test accuracy."""
    model, nan = subject.copy(), math.nan
    advance = subject.sgd(model, rate, momentum)
    losses: list[float] = []
    scores: list[float] = []
    for step in range(steps):
        batch = subject.batches[step % len(subject.batches)]
        output = subject.output(model, batch, seed=step)
        loss = subject.judge(output, target_of(batch))
        if not abs(loss.item()) <= DIVERGED:
            return losses + [nan] * (steps - len(losses)), nan, nan, nan
        losses.append(loss.item())
        scores.append(accuracy(output, target_of(batch)))
        advance(loss)
    last = max(1, steps // 4)
    final, score = sum(losses[-last:]) / last, sum(scores[-last:]) / last
    model.eval()
    with torch.no_grad():
        tested = [accuracy(subject.output(model, batch), target_of(batch)) for batch in test]
    return losses, final, score, sum(tested) / len(tested) if tested else nan


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs by default, if no rate diverges."""
    return Passes(forward=len(RATES) * STEPS, backward=len(RATES) * STEPS)


def panels(found: Mapping[str, LearningRates]) -> list[Panel]:
    """Final loss, and accuracy where there is one, against the rate; diverged rates are left out."""

    def series(of: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: (at.rates.tolist(), getattr(at, of).tolist()) for name, at in found.items()}

    drawn = [Panel("training loss after some steps", series("loss"), "learning rate", log="x")]
    for of, title in (("accuracy", "training accuracy, %"), ("test", "test accuracy, %")):
        if any(not getattr(at, of).isnan().all() for at in found.values()):
            drawn.append(Panel(title, series(of), "learning rate", log="x"))
    return drawn


def plot(found: Mapping[str, LearningRates]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, LearningRates]) -> str:
    """Largest stable and best rate in words."""
    return "; ".join(
        f"{name}: stable up to a learning rate of {at.largest_stable:.2g}"
        + ("" if math.isnan(at.best) else f", lowest loss at {at.best:.2g}")
        for name, at in found.items()
    )
