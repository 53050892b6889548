"""The noise of the stochastic gradient, from the gradient of each example.

    g_i = grad of L_i,   g = E_i[g_i],   C = E_i |g_i - g|^2
    bound on the noise of a step of size a by a batch of B: a^2 C / B

L_i is the loss of example i's output, in the forward pass of the whole batch: with batch statistics it depends on the
other examples too. A smaller C allows larger steps for the same noise (Bjorck et al., arXiv 1806.02375, on SGD).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import AnybatchError
from .panels import Panel
from .subject import Passes, Subject, target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXAMPLES", "GradientNoise", "measure", "panels", "passes", "plot", "said"]

EXAMPLES = 32  # of the batch, at most


@dataclass(frozen=True)
class GradientNoise:
    """Spread of the examples' gradients.

    Attributes:
        distances: (N,) |g_i - g|^2.
        gradient: |g|^2.
    """

    distances: Tensor
    gradient: float

    @property
    def noise(self) -> float:
        """C, the mean of the distances."""
        return float(self.distances.mean())

    def bound(self, step: float, batch: int) -> float:
        """The bound a^2 C / B on the noise of a step."""
        return step**2 * self.noise / batch


def measure(subject: Subject, batch: int = 0, examples: int = EXAMPLES) -> GradientNoise:
    """Per-example gradients over all parameters, and their mean squared distance from their mean.

    Args:
        subject: the model, its batches and loss; the loss must be a mean over examples.
        batch: which of the batches.
        examples: of it, at most; a backward pass each.

    Raises:
        AnybatchError: the loss cannot be taken of one example's output.
    """
    model = subject.copy()
    parameters = [p for p in model.parameters() if p.requires_grad]
    taken = subject.batch(batch)
    output, target = subject.output(model, taken), target_of(taken)
    if not isinstance(output, Tensor) or not output.dim():
        what = "tensor without examples" if isinstance(output, Tensor) else type(output).__name__
        raise AnybatchError(
            f"diagnose: the noise of gradients needs one output tensor, not a {what}; give "
            "forward=lambda model, batch: ... that picks it"
        )
    count = min(len(output), examples)
    if count < 2:
        raise AnybatchError(
            f"diagnose: the noise of gradients of {examples} examples in a batch of {len(output)}; give two or more"
        )
    losses = [subject.judge(output[i : i + 1], _example(target, i)) for i in range(count)]
    mean = subject.backward(torch.stack(losses).mean(), parameters, again=True)
    distances = []
    for i, loss in enumerate(losses):
        own = subject.backward(loss, parameters, again=i + 1 < count)
        distances.append(sum(float((a - b).double().square().sum()) for a, b in zip(own, mean, strict=True)))
    return GradientNoise(
        torch.tensor(distances, dtype=torch.float64), sum(float(g.double().square().sum()) for g in mean)
    )


def _example(target: Any, i: int) -> Any:
    """The target of one example; as a tuple, so that a batch that is its own target stays one."""
    return tree_map_only(Tensor, lambda t: t[i : i + 1], target)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs at most."""
    return Passes(forward=1, backward=1 + EXAMPLES)


def panels(found: Mapping[str, GradientNoise]) -> list[Panel]:
    """The distances, sorted: a few outliers can make most of C."""
    series = {
        name: (list(range(1, len(at.distances) + 1)), at.distances.sort().values.tolist()) for name, at in found.items()
    }
    return [Panel("|g_i - g|²", series, "example, sorted", log="y")]


def plot(found: Mapping[str, GradientNoise]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, GradientNoise]) -> str:
    """C and what it is beside the gradient, in words."""
    return "; ".join(
        f"{name}: C = {at.noise:.3g}, {at.noise / at.gradient if at.gradient else float('inf'):.2g} times the squared "
        "gradient"
        for name, at in found.items()
    )
