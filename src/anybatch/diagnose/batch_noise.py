"""How far the statistics of a small batch are from the population's, and how many samples a batch really holds.

At a norm's input x, with m_ic, v_ic the mean and variance of channel c over the positions of example i, and mean_c,
var_c those of all examples seen together (population):

    between_c = Var_i[m_ic]                                  what the examples' means differ by (Bessel)
    effective_c = var_c / between_c                          independent samples an example is worth, for the mean
    mean_error(b)^2 = E_c[ between_c / (b var_c) ]           of a batch of b independent examples, exact
    var_error(b)^2 = E_c[ (var_bc / var_c - 1)^2 ]           over batches of b examples drawn at random from those seen
    noise(b)^2 = mean_error(b)^2 + (var_error(b) / 2)^2      what the errors do to a normalised value, to first order

Pixels of one image are not independent, so effective_c is far below the number of positions. Moments are taken in
training mode, at whatever the layers before make of the batches that are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.moments import bessel, moments, pool
from ..errors import AnybatchError
from ..inference.batches import examples_in
from .panels import Panel
from .subject import Passes, Subject
from .watch import norms_of, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REFERENCE", "SIZES", "BatchNoise", "measure", "panels", "passes", "plot", "said", "table"]

SIZES = (1, 2, 4, 8, 16, 32)
REFERENCE = 64  # examples that statistics are measured in, where batches can be joined
_DRAWS = 64
_FEWEST = 8  # examples that say something of a population


@dataclass(frozen=True)
class BatchNoise:
    """Errors of batch statistics, root mean square over channels (and draws), relative to the population's.

    Attributes:
        names: of the norms, L.
        positions: (L,) values of a channel in an example.
        effective: (L,) independent samples that an example is worth, median over channels.
        sizes: batch sizes, S.
        mean_error: (L, S) in standard deviations.
        var_error: (L, S) relative.
        examples: that were seen.
    """

    names: tuple[str, ...]
    positions: Tensor
    effective: Tensor
    sizes: tuple[int, ...]
    mean_error: Tensor
    var_error: Tensor
    examples: int

    @property
    def noise(self) -> Tensor:
        """(S,) mean over the norms of their noise at each batch size."""
        return torch.hypot(self.mean_error, self.var_error / 2).mean(0)

    def noise_at(self, batch: int) -> float:
        """The same at one of ``sizes``."""
        return float(self.noise[self.sizes.index(batch)])


def measure(subject: Subject, sizes: Sequence[int] = SIZES) -> BatchNoise:
    """Errors of mean and variance of every norm's input in batches of each size, from the moments of each example.

    Args:
        subject: the model and its batches; all of them are used, one forward each.
        sizes: of batches.

    Raises:
        AnybatchError: the model has no BatchNorm, or there are too few examples.
    """
    if not sizes or min(sizes) < 1:
        raise AnybatchError(f"diagnose: sizes={tuple(sizes)}; give numbers of examples, each at least 1")
    model = subject.copy()
    norms = norms_of(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    positions: dict[str, int] = {}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        examples, channels = x.shape[:2]
        now = moments(x.detach().double().reshape(1, examples * channels, -1))
        seen.setdefault(name, []).append((now.mean.view(examples, -1).cpu(), now.var.view(examples, -1).cpu()))
        positions[name] = int(now.size)

    with torch.no_grad(), watching(norms, see):
        for batch in subject.batches:
            subject.output(model, batch)
    names = tuple(name for name in norms if name in seen)
    if not names:
        raise AnybatchError("diagnose: the batches reached no BatchNorm; give a forward that calls one")
    examples = {name: [torch.cat(part) for part in zip(*seen[name], strict=True)] for name in names}
    rows = [_errors(examples[name][0], examples[name][1], sizes) for name in names]
    effective, mean_error, var_error = (torch.stack(column) for column in zip(*rows, strict=True))
    count = sum(examples_in(batch) for batch in subject.batches)
    values = torch.tensor([positions[name] for name in names])
    return BatchNoise(names, values, effective, tuple(sizes), mean_error, var_error, count)


def _errors(means: Tensor, variances: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Effective samples (), mean and variance errors (S,), of moments (N, C) of N examples."""
    n = len(means)
    if n < _FEWEST:
        raise AnybatchError(f"diagnose: {n} examples say too little of a population; give batches of {_FEWEST} in all")
    mean, var = pool(means.t(), variances.t())
    alive = var > 1e-12 * (var.max() + mean.square().max())  # what never varies has no error to speak of
    between = bessel(moments(means).var, n)[alive]
    var, means, variances = var[alive], means[:, alive], variances[:, alive]
    if not len(var):
        return torch.tensor(torch.nan, dtype=torch.float64), means.new_zeros(len(sizes)), means.new_zeros(len(sizes))
    generator = torch.Generator().manual_seed(0)
    mean_errors, var_errors = [], []
    for b in sizes:
        drawn = torch.randint(n, (_DRAWS, b), generator=generator)
        _, of_batch = pool(means[drawn].movedim(1, 2), variances[drawn].movedim(1, 2))
        mean_errors.append((between / (b * var)).mean().sqrt())
        var_errors.append((of_batch / var - 1).square().mean().sqrt())
    return (var / between.clamp_min(1e-300)).median(), torch.stack(mean_errors), torch.stack(var_errors)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs."""
    return Passes(forward=len(subject.batches))


def panels(found: Mapping[str, BatchNoise]) -> list[Panel]:
    """Errors against the batch size, and effective samples of an example against its positions, norm by norm."""
    at = next(iter(found.values()))
    order, sizes = [float(k) for k in range(1, len(at.names) + 1)], [float(b) for b in at.sizes]
    errors = {
        "error of the mean, in deviations": (sizes, at.mean_error.mean(0).tolist()),
        "relative error of the variance": (sizes, at.var_error.mean(0).tolist()),
    }
    counts = {"positions": (order, at.positions.tolist()), "effective samples": (order, at.effective.tolist())}
    return [
        Panel("error of batch statistics, mean over norms", errors, "examples in the batch", log="xy"),
        Panel("values of a channel in one example", counts, "norm, in order", log="y"),
    ]


def plot(found: Mapping[str, BatchNoise]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def table(at: BatchNoise) -> tuple[list[str], list[list[str]]]:
    """Head and rows, norm by norm: positions, effective samples, and the noise at each size."""
    noise = torch.hypot(at.mean_error, at.var_error / 2)
    rows = [
        [name, str(int(positions)), f"{float(effective):.3g}", *(f"{100 * float(e):.0f} %" for e in errors)]
        for name, positions, effective, errors in zip(at.names, at.positions, at.effective, noise, strict=True)
    ]
    return ["norm", "positions", "effective samples", *(f"noise at {b}" for b in at.sizes)], rows


def said(found: Mapping[str, BatchNoise]) -> str:
    """Effective samples and noise in words."""
    return "; ".join(
        f"{name}: an example's {int(at.positions.double().median())} positions are worth "
        f"{float(at.effective.median()):.3g} independent samples (median norm); a batch's statistics are off by "
        + ", ".join(f"{100 * float(e):.0f} % at {b}" for b, e in zip(at.sizes, at.noise, strict=True))
        for name, at in found.items()
    )
