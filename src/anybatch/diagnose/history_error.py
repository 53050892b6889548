"""What past statistics are worth as they age: CBN's compensated moments against recomputed ones, on the same data.

The model is trained for some steps. Then for every age tau (steps) and every norm that follows a linear map y = W p:

    naive      moments of y as they were                               mean_tau, var_tau
    carried    the same, carried to today's weights W (core/taylor.py)   mean_tau(W), var_tau(W), deviation expanded
    paper      var with E[y^2] expanded, as in the paper; its floor max(nu, mu^2) holds where it would be negative
    own        moments of W p with the very inputs p of then           what carrying aims at: its Taylor error
    network    moments of y when the old batch runs through today's network      what evaluation will see: its drift

    mean error = sqrt(E_c[(mean - mean')^2 / var']),   var error = sqrt(E_c[(var / var' - 1)^2])

against own and network, over channels. Carrying knows of this layer's weights alone, so what is left against network is
the change of the layers before. Any model will do, converted or not: what CBN would have to work with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..convert.pairing import pair
from ..core.linear_map import LinearMap
from ..core.moments import Moments, moments
from ..core.taylor import Entries, Responses, by_patch, carry
from ..errors import AnybatchError
from .panels import Panel
from .subject import Passes, Subject
from .watch import as_channels, linear, norms_of, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AGES", "KINDS", "HistoryError", "measure", "panels", "passes", "plot", "said", "table"]

AGES = 8
KINDS = (
    "naive against own",
    "carried against own",
    "paper against own",
    "naive against network",
    "carried against network",
)


@dataclass(frozen=True)
class HistoryError:
    """Errors of past moments, root mean square over channels.

    Attributes:
        names: of the maps that norms follow, L.
        ages: (A,) steps since the statistics were taken, 1, 2, ...
        mean_error: by kind, (L, A), in standard deviations.
        var_error: by kind, (L, A), relative.
        floored: (L, A) share of channels where the paper's floor rule holds.
        rate: learning rate of the steps.
    """

    names: tuple[str, ...]
    ages: Tensor
    mean_error: Mapping[str, Tensor]
    var_error: Mapping[str, Tensor]
    floored: Tensor
    rate: float

    def drift(self) -> Tensor:
        """(A,) mean over the maps of what carried moments do to a normalised value, against the network's."""
        kind = KINDS[-1]
        return torch.hypot(self.mean_error[kind], self.var_error[kind] / 2).mean(0)


class _Past(NamedTuple):
    """A map's call at some step."""

    x: Tensor  # as the map was given it; all else in float64
    now: Moments
    patch: Tensor
    covariance: Tensor
    rows: Tensor
    bias: Tensor | None


def measure(subject: Subject, rate: float = 0.1, ages: int = AGES, momentum: float = 0.9) -> HistoryError:
    """Errors of naive, carried and the paper's past moments after 1 to ``ages`` steps of SGD.

    Args:
        subject: the model, its batches and loss; a step a batch, in turn.
        rate: learning rate of these steps; take that of the training.
        ages: steps.
        momentum: of SGD.

    Raises:
        AnybatchError: the model has no BatchNorm, none of them follows a linear map, or the steps diverge.
    """
    if ages < 1:
        raise AnybatchError(f"diagnose: ages={ages}; give at least 1")
    model = subject.copy()
    maps = _fed_by(subject, model)
    advance = subject.sgd(model, rate, momentum)
    past: list[dict[str, _Past]] = []

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name not in past[-1]:  # of a map that runs several times, the first
            past[-1][name] = _taken(module, x.detach(), y.detach())

    with watching(maps, see):
        for step in range(ages):
            past.append({})
            advance(subject.loss_of(model, subject.batches[step % len(subject.batches)], seed=step))
    today: list[dict[str, Moments]] = []

    def see_today(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        today[-1].setdefault(name, moments(as_channels(module, y).double()))

    with torch.no_grad(), watching(maps, see_today):
        for step in range(ages):
            today.append({})
            subject.output(model, subject.batches[step % len(subject.batches)], seed=step)
    names = tuple(name for name in maps if name in past[0])
    with torch.no_grad():
        found = [[_errors(maps[n], past[-age][n], today[-age][n]) for age in range(1, ages + 1)] for n in names]
    table = torch.tensor(found, dtype=torch.float64)  # (L, A, 2 * kinds + 1)
    if not table.isfinite().all():
        raise AnybatchError(f"diagnose: {ages} steps at learning rate {rate} diverge; give the rate of your training")
    return HistoryError(
        names,
        torch.arange(1, ages + 1),
        {kind: table[..., 2 * i] for i, kind in enumerate(KINDS)},
        {kind: table[..., 2 * i + 1] for i, kind in enumerate(KINDS)},
        table[..., -1],
        rate,
    )


def _fed_by(subject: Subject, model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps that norms follow, by name."""
    norms = norms_of(model)
    pairings = pair(model, norms, subject.example_inputs())
    maps = {feed.name: feed.module for pairing in pairings.values() for feed in pairing.feeds}
    if not maps:
        reasons = {pairing.reason for pairing in pairings.values()}
        raise AnybatchError(f"diagnose: no norm follows a linear map: {'; '.join(sorted(reasons))}")
    return maps


def _taken(module: nn.Module, x: Tensor, y: Tensor) -> _Past:
    geometry, weight, bias = LinearMap.of(module), module.weight, module.bias
    assert geometry is not None
    assert isinstance(weight, Tensor)
    wide, y = x.double(), as_channels(module, y).double()
    now = moments(y)
    centred = y - now.mean.view(-1, *[1] * (y.dim() - 2))
    weight = weight.detach().double()
    return _Past(
        x,
        now,
        geometry.mean_patch(wide, tuple(y.shape[2:])),
        geometry.covariance(wide, centred, weight),
        geometry.rows(weight).clone(),  # of a float64 model it is the weight itself, which the optimizer moves
        bias.detach().double().clone() if isinstance(bias, Tensor) else None,
    )


def _errors(module: nn.Module, then: _Past, network: Moments) -> list[float]:
    """Mean and variance error of each kind, and the share of floored channels."""
    geometry, weight, bias = LinearMap.of(module), module.weight, module.bias
    assert geometry is not None
    assert isinstance(weight, Tensor)
    rows = geometry.rows(weight.detach().double())
    shift = bias.detach().double() if isinstance(bias, Tensor) else None
    own = moments(as_channels(module, linear(module, then.x)).double())
    mean_at, mean_today = (
        (by_patch(then.patch.unsqueeze(1), w) + (0 if b is None else b.unsqueeze(1)))
        for w, b in ((then.rows, then.bias), (rows, shift))
    )
    var_at, var_today = ((then.covariance * w).sum(1, keepdim=True) for w in (then.rows, rows))
    mean, var = then.now.mean.unsqueeze(1), then.now.var.unsqueeze(1)
    size = mean.new_full((1,), float(then.now.size))
    entry = Entries(size, mean, var, mean_at, var_at, then.patch.unsqueeze(1), then.covariance.unsqueeze(1))
    carried, paper = (carry(entry, Responses(mean_today, var_today), second) for second in (False, True))
    against = {
        "naive": (then.now.mean, then.now.var),
        "carried": (carried.mean[:, 0], carried.var[:, 0]),
        "paper": (paper.mean[:, 0], paper.var[:, 0]),
    }
    errors = []
    for kind in KINDS:
        (of_mean, of_var), true = against[kind.partition(" ")[0]], own if kind.endswith("own") else network
        alive = ~(true.var <= 1e-12 * (true.var.max() + true.mean.square().max()))
        if not alive.any():
            errors += [0.0, 0.0]
            continue
        apart = (of_mean - true.mean).square()[alive] / true.var[alive]
        errors += [float(apart.mean().sqrt()), float((of_var[alive] / true.var[alive] - 1).square().mean().sqrt())]
    return [*errors, float((paper.var == 0).double().mean())]


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs by default; the example run that finds the maps included."""
    return Passes(forward=2 * AGES + 1, backward=AGES)


def panels(found: Mapping[str, HistoryError]) -> list[Panel]:
    """Errors of the variance and of the mean against age, mean over the maps."""
    at = next(iter(found.values()))
    ages = [float(age) for age in at.ages]
    variance = {kind: (ages, error.mean(0).tolist()) for kind, error in at.var_error.items()}
    mean = {kind: (ages, error.mean(0).clamp_min(1e-6).tolist()) for kind, error in at.mean_error.items()}
    return [
        Panel("relative error of past variances", variance, "age, steps", log="y"),
        Panel("error of past means, deviations", mean, "age, steps", log="y"),
    ]


def plot(found: Mapping[str, HistoryError]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def table(at: HistoryError) -> tuple[list[str], list[list[str]]]:
    """Head and rows, map by map: errors of the variance at the greatest age, and the share of floored channels."""
    errors = torch.stack([at.var_error[kind][:, -1] for kind in KINDS] + [at.floored[:, -1]], 1)
    rows = [[name, *(f"{100 * float(e):.3g} %" for e in row)] for name, row in zip(at.names, errors, strict=True)]
    return [f"map before the norm, after {int(at.ages[-1])} steps", *KINDS, "floored"], rows


def said(found: Mapping[str, HistoryError]) -> str:
    """Errors at the greatest age in words."""
    return "; ".join(
        f"{name}: after {int(at.ages[-1])} steps at rate {at.rate:g} past variances are off by "
        f"{100 * float(at.var_error[KINDS[0]][:, -1].mean()):.0f} % as they were, by "
        f"{100 * float(at.var_error[KINDS[1]][:, -1].mean()):.1f} % carried to today's weights "
        f"({100 * float(at.var_error[KINDS[2]][:, -1].mean()):.1f} % as in the paper, floored in "
        f"{100 * float(at.floored[:, -1].mean()):.1f} % of channels), and by "
        f"{100 * float(at.var_error[KINDS[4]][:, -1].mean()):.0f} % of what today's network makes of the same batch"
        for name, at in found.items()
    )
