"""Example weighing at inference, for any trained model of BatchNorm's family (equations: layers/weighed.py)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.eligible import batch_norms, obstacle, refuse_wrapped
from ..convert.report import Report, Row
from ..convert.walker import share_hooks, swap
from ..errors import AnybatchError
from ..layers.base import NormLayer
from ..layers.options import check_number
from ..layers.weighed import ExampleWeighedBatchNorm
from .batches import check_loader, examples_in, run_on

__all__ = ["ExampleWeights", "tune_example_weight", "weigh_examples_"]

CANDIDATES = tuple(round(0.1 * step, 1) for step in range(11))


def weigh_examples_(model: nn.Module, alpha: float) -> Report:
    """Let every norm evaluate each example with a share ``alpha`` of the example's own moments, in place.

    Training and the state_dict do not change, and neither does evaluation at ``alpha`` = 0, which also takes an
    earlier weighing back. ``alpha`` itself is no part of the state_dict: weigh again after loading one. Weighed norms
    cannot be folded.

    Args:
        model: trained, of BatchNorm's family, converted or not; not wrapped or compiled.
        alpha: from 0 (running moments alone) to 1 (the example's alone); :func:`tune_example_weight` finds it.

    Returns:
        What was done to every norm, and why one was left alone.

    Raises:
        AnybatchError: ``alpha`` is outside of [0, 1], or no norm of the model can be weighed.
    """
    check_number("weigh_examples_", "alpha", alpha, 0, 1)
    refuse_wrapped("weigh_examples_", model)
    rows = {name: _row(name, norm, alpha) for name, norm in batch_norms(model).items()}
    if all(row.action == "left" for row in rows.values()):
        said = "; ".join(dict.fromkeys(row.reason for row in rows.values())) or "it has no BatchNorm"
        raise AnybatchError(f"weigh_examples_: no norm of the model keeps running moments to weigh: {said}")
    if "" in rows and not isinstance(model, NormLayer):
        raise AnybatchError("weigh_examples_: the model itself is the norm and cannot be replaced; wrap it")
    _weigh(model, [name for name, row in rows.items() if row.action == "weighed"], alpha)
    return Report(tuple(rows.values()))


@dataclass(frozen=True)
class ExampleWeights:
    """What :func:`tune_example_weight` found.

    Args:
        alpha: the best candidate; the smallest, of several.
        scores: of every candidate, means over the examples; higher is better.
        examples: that were scored.
    """

    alpha: float
    scores: dict[float, float]
    examples: int


def tune_example_weight(
    model: nn.Module,
    loader: Iterable[Any],
    candidates: Sequence[float] = CANDIDATES,
    score: Callable[[nn.Module, Any], float | Tensor] | None = None,
) -> ExampleWeights:
    """Try every ``alpha`` on validation data, in one pass over ``loader``; the model is left as it was.

    Args:
        model: as for :func:`weigh_examples_`, which takes what comes out: ``weigh_examples_(model, found.alpha)``.
        loader: batches of data that the model was not trained on; read once.
        candidates: values of alpha to try.
        score: of a batch, ``score(model, batch)``, the mean over its examples, higher is better; by default the
            accuracy of ``model(images).argmax(1)`` for a batch (images, labels).

    Returns:
        The best alpha, and every candidate's score.

    Raises:
        AnybatchError: a candidate outside of [0, 1], none at all, no batch, a score that is not finite, or
            what :func:`weigh_examples_` raises.
    """
    if not len(candidates):
        raise AnybatchError("tune_example_weight: no candidates; give values of alpha from 0 to 1")
    for alpha in candidates:
        check_number("tune_example_weight", "alpha", alpha, 0, 1)
    check_loader("tune_example_weight", loader)
    totals, examples = dict.fromkeys(sorted(float(alpha) for alpha in candidates), 0.0), 0
    with _weighing(model) as names:
        for batch in loader:
            count = examples_in(batch)
            examples += count
            for alpha in totals:
                _weigh(model, names, alpha)
                totals[alpha] += count * float((score or _accuracy)(model, batch))
    if not examples:
        raise AnybatchError("tune_example_weight: the loader gave no example; check it, or give a list of batches")
    scores = {alpha: total / examples for alpha, total in totals.items()}
    if bad := [alpha for alpha, mean in scores.items() if not math.isfinite(mean)]:
        raise AnybatchError(
            f"tune_example_weight: the score at alpha={bad[0]} is {scores[bad[0]]}; check data and score"
        )
    return ExampleWeights(max(scores, key=lambda alpha: scores[alpha]), scores, examples)


def _row(name: str, norm: _BatchNorm, alpha: float) -> Row:
    row = Row(name, type(norm).__name__, (norm.num_features,), action="weighed", reason=f"alpha={alpha}")
    reason = obstacle(norm)
    if not reason and (norm.running_mean is None or norm.running_var is None):
        reason = "it keeps no running statistics"
    if not reason and isinstance(norm, NormLayer) and not norm.can_weigh:
        reason = f"{type(norm).__name__} has no running moments of its channels to mix an example's into"
    return Row(row.name, row.type, row.shape, action="left", reason=reason) if reason else row


def _weigh(model: nn.Module, names: Iterable[str], alpha: float) -> None:
    instead: dict[nn.Module, nn.Module] = {}
    for name in names:
        norm = model.get_submodule(name)
        if isinstance(norm, NormLayer):
            norm.alpha = float(alpha)
        elif isinstance(norm, _BatchNorm):
            instead[norm] = ExampleWeighedBatchNorm.replacing(norm, alpha=float(alpha))
            share_hooks(norm, instead[norm])
    swap(model, instead)


@contextmanager
def _weighing(model: nn.Module) -> Iterator[list[str]]:
    """The names of the norms that can be weighed, in evaluation without gradients; then the model is as before."""
    norms = batch_norms(model)
    modes = [(module, module.training) for module in model.modules()]
    alphas = [(norm, norm.alpha) for norm in norms.values() if isinstance(norm, NormLayer)]
    try:
        report = weigh_examples_(model, 0.0)
        model.eval()
        with torch.no_grad():
            yield [row.name for row in report.rows if row.action == "weighed"]
    finally:
        swap(model, {model.get_submodule(name): norm for name, norm in norms.items()})
        for norm, alpha in alphas:
            norm.alpha = alpha
        for module, training in modes:
            module.training = training


def _accuracy(model: nn.Module, batch: Any) -> float:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise AnybatchError(
            f"tune_example_weight: a batch is a {type(batch).__name__}, not (inputs, labels), both tensors; "
            "say how to score it: score=lambda model, batch: ..."
        )
    outputs, labels = run_on("tune_example_weight", model, batch), batch[1]
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.argmax(1).shape != labels.shape:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise AnybatchError(
            f"tune_example_weight: the model's outputs ({shape}) are no scores of classes for labels of shape "
            f"{tuple(labels.shape)}; say how to score a batch: score=lambda model, batch: ..."
        )
    return float((outputs.argmax(1) == labels).double().mean())
