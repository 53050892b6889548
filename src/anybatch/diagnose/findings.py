"""From measurements to statements: what is wrong, what is well, and what to do about it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .evaluation_gap import TROUBLE, EvaluationGap

__all__ = ["GIVEN", "WITHOUT", "Finding", "Situation", "judge"]

GIVEN, WITHOUT = "as given", "without norms"
_FEWEST = 8  # rows of the output that can be said to be alike
_LEVELS = ("trouble", "well", "note")


@dataclass(frozen=True)
class Finding:
    """A statement, and the experiment it is from."""

    level: Literal["trouble", "well", "note"]
    experiment: str
    text: str


@dataclass(frozen=True)
class Situation:
    """What a rule knows of the model besides.

    Attributes:
        batch: examples of the loader's batches.
        trained: whether the running statistics have seen a batch.
        plain: whether the norms are torch's BatchNorm, which goes by the batch alone.
    """

    batch: int
    trained: bool
    plain: bool


def judge(results: Mapping[str, Mapping[str, Any]], situation: Situation) -> tuple[Finding, ...]:
    """What the results say of the model as it was given, troubles first.

    Args:
        results: by experiment and subject.
        situation: of the model.
    """
    found = []
    for experiment, by_subject in results.items():
        if GIVEN in by_subject and experiment in _RULES:
            rule = _RULES[experiment](by_subject[GIVEN], by_subject.get(WITHOUT), situation)
            found += [Finding(level, experiment, text) for level, text in rule]
    return tuple(sorted(found, key=lambda finding: _LEVELS.index(finding.level)))


Statements = Iterator[tuple[Literal["trouble", "well", "note"], str]]


def _evaluation_gap(at: EvaluationGap, bare: Any, around: Situation) -> Statements:
    training, evaluation = at.losses["training"], at.losses["evaluation"]
    mended = at.losses.get("recalibrated", evaluation)
    losses = f"loss {evaluation:.3g} in evaluation, {training:.3g} in training"
    if not around.trained:
        yield "note", f"the running statistics have not seen a batch, so evaluation is not the model's yet ({losses})"
    elif _within(evaluation, 1.25, training):
        differ = f"outputs of the norms differ by {100 * at.overall:.0f} %"
        if at.overall < TROUBLE:
            yield "well", f"evaluation does what training does: {differ}"
        else:
            yield "note", f"{differ} between training and evaluation, though the loss does not show it ({losses})"
    elif at.overall < TROUBLE and _within(evaluation, 1.5, training):
        yield "well", f"evaluation does what training does: outputs of the norms differ by {100 * at.overall:.0f} %"
    elif _within(mended, 1.25, training):
        yield (
            "trouble",
            (
                f"evaluation is off ({losses}) because the running statistics are behind: "
                f"ab.recalibrate_(model, loader) brings it to {mended:.3g}"
            ),
        )
    else:
        yield (
            "trouble",
            (
                f"evaluation fails ({losses}, {mended:.3g} after recalibration; outputs of the norms differ by "
                f"{100 * at.overall:.0f} %): no running average stands for the statistics of "
                f"{_examples(around.batch)} that training normalises by. Train with another method: anybatch advise"
            ),
        )


def _within(loss: float, factor: float, of: float) -> bool:
    """Whether a loss is at most so many times the other, whatever its sign."""
    return loss - of <= (factor - 1) * abs(of)


def _batch_noise(at: Any, bare: Any, around: Situation) -> Statements:
    if around.batch not in at.sizes:
        return
    noise = at.noise_at(around.batch)
    words = f"statistics of {_examples(around.batch)} are off by {100 * noise:.0f} % of a standard deviation"
    if not around.plain:
        yield "note", f"{words}, if one goes by the batch alone"
    elif noise > 0.2:
        yield "trouble", f"{words}: anybatch advise says what to use instead of BatchNorm"
    else:
        yield "well", words


def _step_size(at: Any, bare: Any, around: Situation) -> Statements:
    if not at.largest_lowering:
        yield "trouble", "no step along the gradient lowers the loss of its own batch: the gradient is wrong or nothing"
    elif bare is not None and bare.largest_lowering:
        times = at.largest_lowering / bare.largest_lowering
        if not 0.5 < times < 2:
            yield "note", f"steps that lower the loss may be {times:.3g} times as large as without the norms"


def _depth(at: Any, bare: Any, around: Situation) -> Statements:
    spread = float(at.var.max() / at.var.min().clamp_min(1e-300))
    if (at.var <= 0).any():
        yield "trouble", f"'{at.names[int(at.var.argmin())]}' puts out the same for every example and position"
    elif spread > 1e4:
        yield "trouble", f"the variance of what the layers put out differs by a factor of {spread:.1g} between layers"


def _learning_rate(at: Any, bare: Any, around: Situation) -> Statements:
    if not at.largest_stable:
        yield "trouble", f"training diverges at every learning rate from {float(at.rates[0]):g} on"
    elif bare is not None:
        beside = f"up to {bare.largest_stable:g}" if bare.largest_stable else "at none that was tried"
        yield "note", f"trains at learning rates up to {at.largest_stable:g}, without the norms {beside}"


def _logit_gradients(at: Any, bare: Any, around: Situation) -> Statements:
    if at.common > 0.5 and len(at.matrix) >= _FEWEST:
        yield "trouble", f"{100 * at.common:.0f} % of the gradient at the output is the same whatever the input"


def _weight_gradients(at: Any, bare: Any, around: Situation) -> Statements:
    if at.kurtosis > 10:
        yield "note", f"gradients of '{at.layer}' are heavy-tailed: kurtosis {at.kurtosis:.0f}"


def _cancellation(at: Any, bare: Any, around: Situation) -> Statements:
    ratio = float(at.ratio.median())
    if ratio > 0.3:
        yield "note", f"the terms of a weight's gradient hardly cancel: sums are {100 * ratio:.0f} % of their terms"


def _examples(batch: int) -> str:
    return "one example" if batch == 1 else f"{batch} examples"


_RULES: dict[str, Any] = {
    "evaluation-gap": _evaluation_gap,
    "batch-noise": _batch_noise,
    "depth": _depth,
    "logit-gradients": _logit_gradients,
    "step-size": _step_size,
    "learning-rate": _learning_rate,
    "weight-gradients": _weight_gradients,
    "cancellation": _cancellation,
}
