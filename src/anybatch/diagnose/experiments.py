"""The table of experiments: everything that enumerates them reads it here.

Adding one is one file with ``measure``, ``passes``, ``plot`` and ``said``, one row here and one section in
docs/diagnose/. A file that has ``measure_all`` measures all subjects together.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import AnybatchError
from . import batch_noise as batch_noise
from . import cancellation as cancellation
from . import depth as depth
from . import diverging_step as diverging_step
from . import evaluation_gap as evaluation_gap
from . import gaussian_products as gaussian_products
from . import gradient_noise as gradient_noise
from . import history_error as history_error
from . import learning_rate as learning_rate
from . import logit_gradients as logit_gradients
from . import step_size as step_size
from . import weight_gradients as weight_gradients
from .subject import Passes, Subject

__all__ = ["EXPERIMENTS", "Experiment", "choose"]


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Args:
        name: as typed.
        title: as a heading.
        question: that it answers.
        module: with ``measure(subject, **options)``, ``passes``, ``plot`` and ``said``.
        compares: whether a network without its norms is measured too.
        needs_norms: whether it is about batch statistics, so that a model without BatchNorm has nothing to measure.
        reference: examples that batches are joined to, where they can be; 0: they stay as they are.
    """

    name: str
    title: str
    question: str
    module: ModuleType
    compares: bool = True
    needs_norms: bool = False
    reference: int = 0

    def run(self, subjects: Mapping[str, Subject], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Results by subject, and for those that have none the reason; the options are checked."""
        found: dict[str, Any] = {}
        failed: dict[str, str] = {}
        if hasattr(self.module, "measure_all") and not options:
            try:
                return self.module.measure_all(subjects), {}
            except AnybatchError as error:
                return {}, dict.fromkeys(subjects, _said(error))
        for name, subject in subjects.items():
            try:
                found[name] = self.module.measure(subject, **options)
            except AnybatchError as error:
                failed[name] = _said(error)
        return found, failed

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that ``measure`` has not.

        Raises:
            AnybatchError: naming the first of them, and what there is.
        """
        known = [name for name in inspect.signature(self.module.measure).parameters if name != "subject"]
        if unknown := [name for name in options if name not in known]:
            raise AnybatchError(f"diagnose: {self.name} has no option '{unknown[0]}'; it has {', '.join(known)}")

    def passes(self, subjects: Mapping[str, Subject]) -> Passes:
        """What the subjects cost, at most."""
        return sum((self.module.passes(subject) for subject in subjects.values()), Passes())


def _said(error: AnybatchError) -> str:
    return str(error).removeprefix("diagnose: ")


_ROWS = (
    Experiment("depth", "Moments against depth", "Does the signal keep its scale from layer to layer?", depth),
    Experiment("step-size", "One step along the gradient", "How far may a step go until the loss explodes?", step_size),
    Experiment(
        "diverging-step", "Along a diverging step", "Which layers' moments break when a step diverges?", diverging_step
    ),
    Experiment(
        "learning-rate", "Learning rates", "At which learning rates does the network train, and which is best?",
        learning_rate,
    ),
    Experiment(
        "weight-gradients", "Gradients in the middle", "Are a layer's gradients concentrated, or heavy-tailed?",
        weight_gradients,
    ),
    Experiment(
        "logit-gradients", "Gradients at the output", "Does the gradient at the output depend on the input?",
        logit_gradients,
    ),
    Experiment(
        "cancellation", "Cancellation in weight gradients", "Do the terms of a gradient pull the same way, or cancel?",
        cancellation,
    ),
    Experiment(
        "gradient-noise", "Noise of the gradient", "How far are examples' gradients from their mean?", gradient_noise
    ),
    Experiment(
        "gaussian-products", "Products of random matrices", "How fast does depth alone spoil the conditioning?",
        gaussian_products, compares=False,
    ),
    Experiment(
        "batch-noise", "Noise of batch statistics", "How much is a batch worth, and how far off is a small one?",
        batch_noise, compares=False, needs_norms=True, reference=batch_noise.REFERENCE,
    ),
    Experiment(
        "evaluation-gap", "Training against evaluation", "Does evaluation do what training did?",
        evaluation_gap, compares=False, needs_norms=True,
    ),
    Experiment(
        "history-error", "Age of past statistics", "How fast do past statistics spoil, and what does CBN mend?",
        history_error, compares=False, needs_norms=True,
    ),
)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {row.name: row for row in _ROWS}


def choose(names: Sequence[str] | None) -> list[Experiment]:
    """The experiments of these names, in the table's order; all of them by default.

    Raises:
        AnybatchError: there is none of a name; the closest are given.
    """
    if names is None:
        return list(EXPERIMENTS.values())
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in EXPERIMENTS:
            close = difflib.get_close_matches(name, EXPERIMENTS, cutoff=0.3) or list(EXPERIMENTS)
            raise AnybatchError(f"diagnose: there is no experiment '{name}'; did you mean {' or '.join(close)}?")
    return [row for name, row in EXPERIMENTS.items() if name in names]
