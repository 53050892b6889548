"""Which normalization to train with at a batch size: from the noise of the statistics and what such noise cost before.

    predicted(method) = the method's accuracy less BatchNorm's at batch 32, in our runs at the noise measured here

Noise is :attr:`BatchNoise.noise` at the batch size that is asked about; our runs (assets/experience.json, made of
docs/results/studies by scripts/make_experience.py) have each method at four noises, between which the logarithm of the
noise is interpolated, and beyond which it is not extrapolated. Of the methods within a point of the best BatchNorm is
advised if it is one, then CBN, which kept its accuracy in every setting we ran, then the simplest. CBN's window is 64
examples, k = 64 / b batches, unless 32 or 16, of a network that moves on fast, make the statistics pooled over them
much better:

    error(k)^2 = noise(b)^2 / k + drift(k / 2)^2        drift: history_error's, of carried against recomputed moments

One network on one data set is what experience there is: the noise is yours, the points are a forecast.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..convert.eligible import batch_norms
from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.config import NormConfig
from ..methods import METHODS, parse_method
from ..typed import split_method, write_method
from . import batch_noise, history_error
from .batch_noise import BatchNoise
from .experience import forecast_of
from .history_error import HistoryError
from .learning_rate import accuracy
from .subject import Forward, Loss, Subject, target_of

__all__ = ["Advice", "Candidate", "about", "advise", "recommend"]

_CLOSE = 1.0  # points within which the surer method is advised: three seeds tell no less apart
_SURE_FIRST = ("bn", "cbn", "accumulated", "renorm", "gn", "proxynorm-group")
_WINDOW = 64  # examples, CBN's default
_WINDOWS = (16, 32, 64)
_MUCH = 0.75  # of the error at the usual window: less is worth another one
_GROUPS = 32  # torch's users' habit; fewer where channels are few


@dataclass(frozen=True)
class Candidate:
    """A method and its forecast.

    Attributes:
        method: as typed: "cbn(window_examples=32)".
        points: forecast against BatchNorm at batch 32.
        folds: whether it folds into the convolution before it at inference.
    """

    method: str
    points: float
    folds: bool


@dataclass(frozen=True)
class Advice:
    """What to train with; ``print`` it.

    Attributes:
        batch: examples a norm sees at once.
        micro_batches: of one optimizer step.
        candidates: the advised one first, then by their forecasts.
        noise: of the batch's statistics, and pooled as advised, and of BatchNorm's at batch 32.
        evidence: what was measured, a line each.
        caution: how far the forecast is to be trusted.
        converted: the class of norm that the model has instead of torch's BatchNorm; empty if it has that.
    """

    batch: int
    micro_batches: int
    candidates: tuple[Candidate, ...]
    noise: Mapping[str, float]
    evidence: tuple[str, ...]
    caution: str
    converted: str = ""

    @property
    def method(self) -> str:
        """The advised one, as typed."""
        return self.candidates[0].method

    @property
    def config(self) -> NormConfig:
        """The advised one, for :func:`anybatch.convert_`."""
        return parse_method(self.method)

    @property
    def gain(self) -> float:
        """Forecast against BatchNorm at the same batch size, in points."""
        plain = next(candidate.points for candidate in self.candidates if candidate.method == "bn")
        return self.candidates[0].points - plain

    @property
    def code(self) -> str:
        """The advised config, as one writes it."""
        name, options = split_method(self.method)
        options = getattr(METHODS[name].make, "keywords", {}) | options
        return "ab." + (
            write_method(type(self.config).__name__, options) if options else f"{type(self.config).__name__}()"
        )

    def __str__(self) -> str:
        first, *others = self.candidates
        plain = "BatchNorm at batch"
        steps = f", {self.micro_batches} batches a step of the optimizer" if self.micro_batches > 1 else ""
        forecast = f"{first.points:+.1f} points against {plain} 32"
        if self.batch != 32:
            forecast += f", {self.gain:+.1f} against {plain} {self.batch}"
        rest = [f"{c.method} {c.points:+.1f}{'' if c.folds else ' (does not fold)'}" for c in others]
        lines = [
            f"At batch {self.batch}{steps}: {self.code}",
            f"forecast: {forecast}",
            *self.evidence,
            f"the others: {', '.join(rest)}",
            f"to do it: {self._how()}",
            self.caution,
        ]
        return "\n  ".join(lines)

    def _how(self) -> str:
        if self.method == "bn":
            return "ab.revert_(model)" if self.converted else "leave BatchNorm as it is"
        if self.converted and self.converted == getattr(getattr(self.config, "layer", None), "__name__", ""):
            return "leave it as it is, with these options"
        if self.converted:
            return f"ab.convert_ the model as it was built, to {self.code}; it has {self.converted} now"
        inputs = ", example_inputs=images" if self.config.needs_example else ""
        attach = "; ab.attach(model, optimizer)" if self.method == "accumulated" else ""
        return f"ab.convert_(model, {self.code}{inputs}){attach}"


@torch.enable_grad()
def advise(
    model: nn.Module | Callable[[], nn.Module],
    loader: Iterable[Any],
    loss: Loss,
    batch_size: int,
    micro_batches: int = 1,
    folds: bool = True,
    forward: Forward | None = None,
    batches: int = 8,
    rate: float = 0.1,
) -> Advice:
    """Measure a model on its data, and say which normalization to train it with at a batch size.

    The model is left as it is. Costs one forward pass of each batch, and 8 steps of training on a copy.

    Args:
        model: with BatchNorm; a module, or a function that builds one.
        loader: gives batches, of any size, with at least 8 examples in all; 64 or more say more.
        loss: of (output, target), as in :func:`anybatch.diagnose`.
        batch_size: examples that a norm shall see at once (per device).
        micro_batches: batches whose gradients make one step of the optimizer.
        folds: advise only what folds into the convolutions at inference.
        forward: as in :func:`anybatch.diagnose`.
        batches: to use.
        rate: learning rate of the training.

    Raises:
        AnybatchError: the model has no BatchNorm, there are too few examples, or the model or loss fails.
    """
    for name, value in (("batch_size", batch_size), ("micro_batches", micro_batches)):
        if value < 1:
            raise AnybatchError(f"advise: {name}={value}; give at least 1")
    subject = Subject(model, loader, loss, batches, forward)
    around = about(subject, subject.check())
    whole = subject.joined(batch_noise.REFERENCE)
    noise = batch_noise.measure(whole, tuple(sorted({*batch_noise.SIZES, batch_size})))
    try:
        history, why = history_error.measure(whole, rate=rate), ""
    except AnybatchError as error:
        history, why = None, str(error).removeprefix("diagnose: ")
    return recommend(noise, history, batch_size, micro_batches, folds, why=why, **around)


def about(subject: Subject, output: Any) -> dict[str, Any]:
    """What :func:`recommend` asks of the model, which put out ``output`` for the first batch."""
    norms = batch_norms(subject.copy()).values()
    ours = [type(norm).__name__ for norm in norms if isinstance(norm, NormLayer)]
    return {
        "channels": [norm.num_features for norm in norms],
        "converted": ours[0] if ours else "",
        "classifier": not math.isnan(accuracy(output, target_of(subject.batches[0]))),
    }


def recommend(
    noise: BatchNoise,
    history: HistoryError | None,
    batch: int,
    micro_batches: int = 1,
    folds: bool = True,
    channels: Sequence[int] = (),
    why: str = "",
    classifier: bool = True,
    converted: str = "",
) -> Advice:
    """The advice that measurements give.

    Args:
        noise: measured at ``batch``, 8 and 32 among its sizes.
        history: None where it could not be measured: CBN is not advised then.
        batch: examples a norm sees at once.
        micro_batches: of one optimizer step.
        folds: only what folds.
        channels: of the norms, for the groups of GroupNorm and Proxy Norm.
        why: there is no ``history``.
        classifier: whether the model is one, as those of the runs were.
        converted: the class of norm that it has instead of torch's BatchNorm.
    """
    level = noise.noise_at(batch)
    window, pooled = _window(noise, history, batch, micro_batches)
    typed = {
        "cbn": "cbn" if window == _WINDOW else f"cbn(window_examples={window})",
        "gn": f"gn(groups={_groups(channels)})",
        "proxynorm-group": f"proxynorm-group(groups={_groups(channels)})",
    }
    left_out = set() if history is not None else {"cbn"}
    left_out |= {"accumulated"} if micro_batches == 1 else set()
    forecast = {name: forecast_of(name, level) for name in _SURE_FIRST if name not in left_out}
    allowed = [name for name in forecast if METHODS[name].foldable or not folds]
    best = max(forecast[name] for name in allowed)
    chosen = next(name for name in allowed if forecast[name] >= best - _CLOSE)
    order = [chosen, *sorted((name for name in forecast if name != chosen), key=lambda name: -forecast[name])]
    candidates = [Candidate(typed.get(name, name), forecast[name], METHODS[name].foldable) for name in order]
    levels = {"batch": level, "pooled": pooled if chosen == "cbn" else level, "batch 32": noise.noise_at(32)}
    if not classifier:
        caution = "the points are of classifiers, and this is none: take the order, not the numbers"
    elif int(noise.positions.median()) == 1:
        caution = "the points are of convolutions, and these norms see one value an example: take the order"
    else:
        caution = "the points are what this noise cost small networks on one data set (docs/results/advice.md)"
    evidence = _evidence(noise, history, levels, batch, chosen, why)
    return Advice(batch, micro_batches, tuple(candidates), levels, evidence, caution, converted)


def _window(noise: BatchNoise, history: HistoryError | None, batch: int, micro_batches: int) -> tuple[int, float]:
    """CBN's window in examples, and the error of the statistics pooled over it."""
    drift = [0.0, *(history.drift().tolist() if history is not None else [])]

    def error(examples: int) -> float:
        k = max(1.0, examples / batch)
        age = min(k / 2 / micro_batches, len(drift) - 1)  # the mean age of the window, in steps
        low = int(age)
        gone = drift[low] + (drift[min(low + 1, len(drift) - 1)] - drift[low]) * (age - low)
        return math.hypot(noise.noise_at(batch) / math.sqrt(k), gone)

    best = min(_WINDOWS, key=error)
    window = best if error(best) < _MUCH * error(_WINDOW) else _WINDOW
    return window, error(window)


def _groups(channels: Sequence[int]) -> int:
    return math.gcd(_GROUPS, *channels)


def _evidence(
    noise: BatchNoise, history: HistoryError | None, levels: Mapping[str, float], batch: int, chosen: str, why: str
) -> tuple[str, ...]:
    examples = "one example" if batch == 1 else f"{batch} examples"
    words = f"statistics of {examples} are off by {100 * levels['batch']:.0f} % of a standard deviation"
    words += f", pooled as advised by {100 * levels['pooled']:.0f} %" if chosen == "cbn" else ""
    words += f", of 32 by {100 * levels['batch 32']:.0f} %" if batch != 32 else ""
    worth, positions = float(noise.effective.median()), int(noise.positions.double().median())
    lines = [words]
    if positions > 1:
        lines.append(
            f"an example's {positions} positions count for {worth:.3g} independent samples (median of the norms)"
        )
    if history is None:
        return (*lines, f"CBN is left out: {why}")
    naive, carried, drift = (
        100 * float(history.var_error[kind][:, 0].mean())
        for kind in (*history_error.KINDS[:2], history_error.KINDS[-1])
    )
    return (
        *lines,
        f"variances one step old, at rate {history.rate:g}: off by {naive:.2g} % as they were, {carried:.2g} % carried "
        f"to today's weights, {drift:.2g} % of what today's network makes of the same batch",
    )
