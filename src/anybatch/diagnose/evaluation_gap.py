"""Whether evaluation does what training did: the norms' outputs in both modes, and what the losses make of it.

    gap_l^2      = E[(train_l - eval_l)^2] / E_c[Var[eval_lc]]       the whole network in training, in evaluation mode
    own_gap_l^2  = the same of this norm alone: both modes on what it is given in training
    mean_gap_l^2 = E_c[(mean_c - running_mean_c)^2 / (running_var_c + eps)]
    sd_gap_l^2   = E_c[ln(sd_c / running_sd_c)^2]

train_l, eval_l are what norm l puts out for the same batch, E over the batch, positions and channels, Var over the
batch and positions, E_c over channels; mean_c, sd_c the batch's. A gap comes of running statistics that are behind
(recalibration mends it: the loss is taken with recalibrated statistics too) or of statistics that no average can stand
for, as BatchNorm's at batch 1 (only another method mends that), and it grows from norm to norm. The running statistics
are those of the model as it is given, for every batch.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.tracing import first_tensor
from ..core.moments import moments
from ..errors import AnybatchError
from ..inference import recalibrate_
from .learning_rate import accuracy
from .panels import Panel
from .subject import Passes, Subject, target_of
from .watch import norms_of, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "TROUBLE",
    "EvaluationGap",
    "evaluated",
    "gap",
    "measure",
    "moment_gaps",
    "panels",
    "passes",
    "plot",
    "said",
    "table",
]

TROUBLE = 0.55  # of the mean gap over norms, from which on evaluation is likely to fail


@dataclass(frozen=True)
class EvaluationGap:
    """Training against evaluation.

    Attributes:
        names: of the norms, L.
        gap: (L,) relative difference of the outputs in the two modes, root mean square over batches.
        own_gap: (L,) the same of the norm alone, both modes on what it is given in training.
        mean_gap: (L,) batch mean against running mean, in running deviations; nan without running statistics.
        sd_gap: (L,) logarithm of batch deviation over running deviation; nan likewise.
        losses: mean over the batches by mode: "training", "evaluation", "recalibrated".
        accuracies: likewise, percent; nan for what is no classifier.
    """

    names: tuple[str, ...]
    gap: Tensor
    own_gap: Tensor
    mean_gap: Tensor
    sd_gap: Tensor
    losses: Mapping[str, float]
    accuracies: Mapping[str, float]

    @property
    def overall(self) -> float:
        """Mean gap over the norms."""
        return float(self.gap.mean())


def gap(training: Tensor, evaluation: Tensor) -> Tensor:
    """Root mean square difference of the two outputs (N, C, *) over the deviation of the second; ()."""
    apart, spread = training.detach().double() - evaluation, moments(evaluation.double()).var.mean()
    return (apart.square().mean() / spread.clamp_min(1e-30)).sqrt()


@torch.no_grad()
def evaluated(norm: nn.Module, x: Tensor) -> Tensor:
    """What the norm would put out in evaluation mode; it is left as it is, and no hook sees it."""
    modes = [(module, module.training) for module in norm.modules()]
    try:
        for module, _ in modes:
            module.training = False
        out: Tensor = norm.forward(x).detach()
    finally:
        for module, training in modes:
            module.training = training
    return out


def measure(subject: Subject) -> EvaluationGap:
    """The gap of every norm between training and evaluation, and the losses in both modes and after recalibration.

    Args:
        subject: the model, its batches and loss; every batch is used.

    Raises:
        AnybatchError: the model has no BatchNorm.
    """
    with torch.no_grad():
        names, rows, results = _both_modes(subject)
        model = subject.copy().eval()
        if _recalibrates(model):
            recalibrate_(model, subject.batches, forward=subject.output, sync=False)
            results["recalibrated"] = [_judged(subject, model, batch) for batch in subject.batches]
    losses, accuracies = ({mode: _mean(found, column) for mode, found in results.items()} for column in (0, 1))
    both, own, mean, sd = torch.stack([row.square().mean(0).sqrt() for row in rows]).unbind(1)
    return EvaluationGap(names, both, own, mean, sd, losses, accuracies)


def _both_modes(subject: Subject) -> tuple[tuple[str, ...], list[Tensor], dict[str, list[tuple[float, float]]]]:
    """Names of the norms, their four gaps at every call (B, 4), and losses with accuracies by mode."""
    model = subject.copy()
    norms = norms_of(model)
    state = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    seen: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}  # in evaluation, by norm, in the order of its calls
    own: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}

    def in_evaluation(name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        outputs.setdefault(name, []).append(y.detach().clone())  # what follows may change it in place

    def starts(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.numel():
            own[norm] = evaluated(norm, x), *moment_gaps(norm, x)

    def ends(name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        if norm in own and outputs.get(name):
            alone, by_mean, by_sd = own.pop(norm)
            both = outputs[name].pop(0)
            if both.shape == y.shape:
                seen.setdefault(name, []).append(torch.stack([gap(y, both), gap(y, alone), by_mean, by_sd]).cpu())

    results: dict[str, list[tuple[float, float]]] = {"training": [], "evaluation": []}
    for batch in subject.batches:
        outputs.clear()
        with watching(norms, in_evaluation):
            results["evaluation"].append(_judged(subject, model.eval(), batch))
        with ExitStack() as hooks:
            for norm in norms.values():
                hooks.callback(norm.register_forward_pre_hook(starts, with_kwargs=True).remove)
            hooks.enter_context(watching(norms, ends))
            results["training"].append(_judged(subject, model.train(), batch))
        for module, key, buffer, kept in state:  # a buffer may have been replaced
            module._buffers[key] = buffer.copy_(kept)
    names = tuple(name for name in norms if name in seen)
    if not names:
        raise AnybatchError("diagnose: no BatchNorm ran in both modes, to compare them; give a forward that calls one")
    return names, [torch.stack(seen[name]) for name in names], results


def moment_gaps(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """mean_gap and sd_gap of a norm on its input x (N, C, *); nan without running statistics of its channels."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None or len(norm.running_mean) != x.shape[1]:
        nan = x.new_full((), torch.nan, dtype=torch.float64)
        return nan, nan
    now = moments(x.detach().double())
    var = norm.running_var.double() + norm.eps
    of_mean = ((now.mean - norm.running_mean).square() / var).mean().sqrt()
    return of_mean, (((now.var + norm.eps) / var).log() / 2).square().mean().sqrt()


def _judged(subject: Subject, model: nn.Module, batch: Any) -> tuple[float, float]:
    output, target = subject.output(model, batch), target_of(batch)
    return float(subject.judge(output, target)), accuracy(output, target)


def _mean(results: list[tuple[float, float]], column: int) -> float:
    return math.fsum(result[column] for result in results) / len(results)


def passes(subject: Subject) -> Passes:
    """What :func:`measure` costs."""
    return Passes(forward=(4 if _recalibrates(subject.copy()) else 2) * len(subject.batches))


def _recalibrates(model: nn.Module) -> bool:
    return any(n.running_mean is not None and getattr(n, "uses_running", True) for n in norms_of(model).values())


def panels(found: Mapping[str, EvaluationGap]) -> list[Panel]:
    """The gap against the number of the norm, and the loss by mode."""
    modes = list(dict.fromkeys(mode for at in found.values() for mode in at.losses))
    gaps = {name: ([float(k) for k in range(1, len(at.names) + 1)], at.gap.tolist()) for name, at in found.items()}
    places = [float(k) for k in range(1, len(modes) + 1)]
    losses = {name: (places, [at.losses.get(mode, math.nan) for mode in modes]) for name, at in found.items()}
    return [
        Panel("gap of training and evaluation", gaps, "norm, in order", level=TROUBLE),
        Panel("loss on the same batches", losses, "", ticks=modes),
    ]


def plot(found: Mapping[str, EvaluationGap]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def table(at: EvaluationGap) -> tuple[list[str], list[list[str]]]:
    """Head and rows, norm by norm."""
    gaps = torch.stack([at.gap, at.own_gap, at.mean_gap, at.sd_gap], 1)
    rows = [[name, *(f"{float(g):.2g}" for g in row)] for name, row in zip(at.names, gaps, strict=True)]
    return ["norm", "gap", "of the norm alone", "of the mean, in deviations", "of the log deviation"], rows


def said(found: Mapping[str, EvaluationGap]) -> str:
    """The gap and the losses in words."""
    return "; ".join(
        f"{name}: the norms' outputs in training and evaluation differ by {100 * at.overall:.0f} %; the loss is "
        + ", ".join(
            f"{loss:.3g} " + ("after recalibration" if mode == "recalibrated" else f"in {mode}")
            for mode, loss in at.losses.items()
        )
        for name, at in found.items()
    )
