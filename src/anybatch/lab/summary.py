"""What the finished runs say: rows of a table, and two sentences that claim no more than the numbers do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from anybatch.lab.config import ClassifyConfig, TrainConfig
from anybatch.lab.statistics import Estimate, estimate
from anybatch.lab.training import RunResult
from anybatch.methods import METHODS
from anybatch.typed import split_method

__all__ = ["REFERENCE", "Row", "Summary", "grouped", "headed", "is_reference", "label", "paired", "summarise"]

REFERENCE = "bn"  # at the gradient batch
PERCENT = "\N{NO-BREAK SPACE}%"
BESIDES = {"frozen": "Frozen BN"}  # what a task knows besides the table of methods
WIDE = 3.0  # points: an interval wider to each side says that seeds are too few, not that methods are alike
LEAST = 3  # seeds: the spread of two may be next to nothing by chance
FEW = 4  # variants of one method that are each worth a sentence


def label(method: str) -> str:
    """The name of a method for people: "cbn-paper(burn_in_steps='1/3')" -> "CBN as released (burn-in 1/3)"."""
    name, options = split_method(method)
    known = METHODS.get(name)
    called = known.label if known else BESIDES.get(name, name)
    if not options:
        return called
    told = ", ".join(_told(option, value) for option, value in options.items())
    return f"{called.removesuffix(')')}, {told})" if called.endswith(")") else f"{called} ({told})"


def _told(option: str, value: Any) -> str:
    if (option, value) == ("average_reductions", "step"):
        return "reductions over a step"
    return f"{'burn-in' if option == 'burn_in_steps' else option} {value}".replace("_", " ")


def headed(measure: str) -> str:
    """A measure at the head of a column or an axis: "test accuracy" -> "Test accuracy, %"."""
    return f"{measure[:1].upper()}{measure[1:]}, %"


@dataclass(frozen=True)
class Row:
    """One method at one batch size, over its seeds.

    Attributes:
        accuracy: test accuracy in percent; None if every run diverged.
        difference: to the reference, paired by seed, in points; None without a seed that both have.
        train_accuracy: mean over seeds, in percent.
        seconds: mean over seeds.
    """

    method: str
    batch: int
    accuracy: Estimate | None
    difference: Estimate | None
    train_accuracy: float | None
    seconds: float
    runs: int
    diverged: int
    is_reference: bool

    @property
    def label(self) -> str:
        """The name of the method for people."""
        return label(self.method)


@dataclass(frozen=True)
class Summary:
    """Rows in the order of methods and batches, the reference first; and the conclusion in sentences.

    Attributes:
        measure: what is compared, in percent: "test accuracy".
        examples: what a norm sees a batch of: "images".
    """

    rows: tuple[Row, ...]
    conclusions: tuple[str, ...]
    measure: str
    examples: str

    @property
    def reference(self) -> Row | None:
        """BatchNorm at the gradient batch, if it has finished."""
        return next((row for row in self.rows if row.is_reference), None)

    @property
    def methods(self) -> tuple[str, ...]:
        """The compared methods, in order, without the reference."""
        return tuple(dict.fromkeys(row.method for row in self.rows if not row.is_reference))

    @property
    def smallest_batch(self) -> int | None:
        """The smallest compared batch size."""
        return min((row.batch for row in self.rows if not row.is_reference), default=None)


def is_reference(config: TrainConfig) -> bool:
    """Whether a run is BatchNorm at the full gradient batch."""
    return config.method == REFERENCE and config.batch == config.gradient_batch


def summarise(results: Iterable[RunResult], methods: Sequence[str] = ()) -> Summary:
    """Groups `results` by method and batch size; `methods` gives the order."""
    results = list(results)
    groups = grouped(results)
    reference = next((g for g in groups if is_reference(next(iter(groups[g].values())).config)), None)
    order = {method: place for place, method in enumerate(methods)}
    keys = sorted(groups, key=lambda key: (key != reference, order.get(key[0], len(order)), key))
    rows = tuple(_row(groups[key], groups.get(reference) if reference else None, key == reference) for key in keys)
    config: TrainConfig | type[TrainConfig] = results[0].config if results else ClassifyConfig
    return Summary(rows, _conclusions(rows, config.measure), config.measure, config.examples)


def grouped(results: Iterable[RunResult]) -> dict[tuple[str, int], dict[int, RunResult]]:
    """Runs by method and batch size, and there by seed."""
    groups: dict[tuple[str, int], dict[int, RunResult]] = {}
    for result in results:
        groups.setdefault((result.config.method, result.config.batch), {})[result.config.seed] = result
    return groups


def paired(group: Mapping[int, RunResult], other: Mapping[int, RunResult]) -> Estimate | None:
    """The difference of two groups of runs by seed, in points; None without a seed at which both have finished."""
    both = [(run.accuracy, other[seed].accuracy) for seed, run in group.items() if seed in other]
    differences = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
    return estimate(differences) if differences else None


def _row(group: dict[int, RunResult], reference: dict[int, RunResult] | None, is_reference: bool) -> Row:
    config = next(iter(group.values())).config
    accuracies = {seed: r.accuracy for seed, r in group.items() if r.accuracy is not None}
    train = [r.train_accuracy for r in group.values() if r.train_accuracy is not None]
    return Row(
        method=config.method,
        batch=config.batch,
        accuracy=estimate(list(accuracies.values())) if accuracies else None,
        difference=None if is_reference or reference is None else paired(group, reference),
        train_accuracy=fmean(train) if train else None,
        seconds=fmean(r.seconds for r in group.values()),
        runs=len(group),
        diverged=len(group) - len(accuracies),
        is_reference=is_reference,
    )


def _conclusions(rows: Sequence[Row], measure: str) -> tuple[str, ...]:
    reference = next((row for row in rows if row.is_reference), None)
    if reference is None or reference.accuracy is None:
        return ("BatchNorm at the full gradient batch, the reference, has no finished run yet: nothing to conclude.",)
    at = f"BatchNorm at batch {reference.batch}"
    smallest = min((row.batch for row in rows if not row.is_reference), default=None)
    small = [row for row in rows if row.batch == smallest and not row.is_reference]
    collapsed = next((row for row in small if row.method == REFERENCE), None)
    others = [row for row in small if row.method != REFERENCE and row.accuracy is not None]
    sentences = [f"{at} reaches {reference.accuracy.mean:.1f}{PERCENT} {measure} ({_seeds(reference.accuracy.n)})."]
    if collapsed is not None:
        sentences = [_sentence(collapsed, f"At batch {smallest}, BatchNorm", at)]
    if others:
        best = max(others, key=lambda row: row.accuracy.mean if row.accuracy else 0.0)
        if len({split_method(row.method)[0] for row in others}) == 1 and len(others) <= FEW:
            sentences += [_sentence(row, f"At batch {smallest}, {row.label}", at) for row in others]
        else:
            which = f"{best.label}, the best of {len(others)} other methods there,"
            sentences.append(_sentence(best, f"At batch {smallest}, {which}", at))
    if bad := [f"{row.label} at batch {row.batch}" for row in rows if row.diverged]:
        sentences.append(f"Diverged, and not in any mean: {', '.join(bad)}.")
    return tuple(sentences)


def _sentence(row: Row, subject: str, reference: str) -> str:
    if row.accuracy is None:
        return f"{subject} diverged."
    head = f"{subject} reaches {row.accuracy.mean:.1f}{PERCENT}"
    difference = row.difference
    if difference is None:
        return f"{head}; no seed is shared with {reference}, so there is no paired difference."
    if difference.half_width is None:
        return f"{head}, {_points(difference.mean)} {reference} on one seed: no interval, so take it as a hint."
    interval = f"95{PERCENT} interval {_signed(difference.mean - difference.half_width)} to "
    interval += f"{_signed(difference.mean + difference.half_width)}, {_seeds(difference.n)}, paired"
    if difference.n < LEAST or (difference.spans_zero and difference.half_width > WIDE):
        return f"{head}: too few seeds to tell from {reference} ({_signed(difference.mean)} points, {interval})."
    if difference.spans_zero:
        return f"{head}: no difference from {reference} was measured ({_signed(difference.mean)} points, {interval})."
    return f"{head}, {_points(difference.mean)} {reference} ({interval})."


def _points(difference: float) -> str:
    if round(difference, 1) == 0:
        return "level with"
    return f"{abs(difference):.1f} points {'below' if difference < 0 else 'above'}"


def _signed(value: float) -> str:
    return f"{round(value, 1) or 0.0:+.1f}".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0")


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"
