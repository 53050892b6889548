"""Whether the gradient at the network's output depends on its input.

    G_ik = N dL/dz_ik      z (N, K) what the model puts out, L a mean over examples
    common = N |E_i[G_i]|^2 / sum_i |G_i|^2        from 0 to 1: the share of G that is the same for every example

Without normalization most examples push the same output up and the same ones down, whatever is in them (Bjorck et al.,
arXiv 1806.02375, their heat map of gradients at the output). Of dense outputs (N, K, *) every position is an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import AnybatchError
from .panels import Heat, Tile
from .subject import Passes, Subject, target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LogitGradients", "measure", "panels", "passes", "plot", "said"]


@dataclass(frozen=True)
class LogitGradients:
    """The gradient at the output.

    Attributes:
        matrix: (N, K) G, or (N * positions, K).
        common: the share of it that no example changes.
    """

    matrix: Tensor
    common: float


def measure(subject: Subject, batch: int = 0) -> LogitGradients:
    """The gradient of the loss at the model's output (N, K, *), a row for each example and position.

    Args:
        subject: the model, its batches and loss.
        batch: which of them.

    Raises:
        AnybatchError: the output is no tensor of (N, K, *).
    """
    model = subject.copy()
    z = subject.output(model, subject.batch(batch))
    if not isinstance(z, Tensor) or z.dim() < 2:
        what = f"tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise AnybatchError(
            f"diagnose: the gradient at the output needs a model that puts out a tensor (examples, classes, *), and "
            f"this one puts out a {what}; give forward=lambda model, batch: ... that picks it"
        )
    (g,) = subject.backward(subject.judge(z, target_of(subject.batch(batch))), [z])
    rows = g.double().cpu().unsqueeze(-1).flatten(2).movedim(1, 2).flatten(0, 1)
    matrix = len(rows) * rows
    total = float(matrix.square().sum())
    common = float(len(matrix) * matrix.mean(0).square().sum() / total) if total else float("nan")
    return LogitGradients(matrix, common)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs."""
    return Passes(forward=1, backward=1)


def panels(found: Mapping[str, LogitGradients]) -> list[Heat]:
    """A heat map a subject: examples from top to bottom, outputs from left to right."""
    tiles = [Tile(name, at.matrix[:64, :64].tolist()) for name, at in found.items()]
    return [Heat(tiles, len(tiles), "N dL / d output", "output", "example", signed=True)]


def plot(found: Mapping[str, LogitGradients]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, LogitGradients]) -> str:
    """The common share in words."""
    return "; ".join(
        f"{name}: {100 * at.common:.0f} % of the gradient at the output is the same for every example"
        for name, at in found.items()
    )
