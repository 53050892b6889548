"""Methods against batch sizes against seeds, with BatchNorm at the full gradient batch as the reference."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from anybatch.lab import machine
from anybatch.lab.config import TrainConfig
from anybatch.lab.display import Display
from anybatch.lab.report import PICTURES
from anybatch.lab.results import Results
from anybatch.lab.summary import REFERENCE, is_reference
from anybatch.lab.tasks import open_task
from anybatch.lab.training import RunResult, run_key
from anybatch.lab.workers import Advanced, Failed, Finished, Started, run_all
from anybatch.methods import METHODS
from anybatch.typed import split_method, tidy_method

__all__ = ["FULL", "QUICK", "Outcome", "Preset", "compare", "cost", "expand", "plan", "schedule"]


@dataclass(frozen=True)
class Preset:
    """What is compared unless the command line says otherwise."""

    methods: tuple[str, ...]
    batches: tuple[int, ...]
    seeds: int
    epochs: int
    train_images: int | None


FULL = Preset(("bn", "gn(groups=4)", "cbn-naive", "cbn-paper(burn_in_steps='1/3')", "cbn"), (1, 2, 4), 3, 3, None)
QUICK = Preset(("bn", "gn(groups=4)", "cbn"), (1, 4), 1, 4, 2000)


@dataclass
class Outcome:
    """What came of a comparison.

    Attributes:
        results: the finished runs of this plan, those of earlier calls included.
        failures: (run, reason).
        reused: runs that an earlier call had finished.
        interrupted: whether Ctrl-C ended it.
    """

    results: list[RunResult]
    failures: list[tuple[TrainConfig, str]] = field(default_factory=list)
    reused: int = 0
    interrupted: bool = False


def plan(base: TrainConfig, methods: Sequence[str], batches: Sequence[int], seeds: int) -> list[TrainConfig]:
    """The reference and every method at every batch size, for every seed; each run once. "all" is the whole table."""
    pairs = dict.fromkeys([(REFERENCE, base.gradient_batch), *((m, b) for m in expand(base, methods) for b in batches)])
    return [replace(base, method=m, batch=b, seed=seed) for m, b in pairs for seed in range(seeds)]


def expand(base: TrainConfig, methods: Sequence[str]) -> list[str]:
    """Methods as typed, each once, with the whole table in the place of "all"."""
    found = [m for typed in methods for m in (base.all_methods() if typed.strip() == "all" else (tidy_method(typed),))]
    return list(dict.fromkeys(found))


def cost(config: TrainConfig) -> float:
    """About how long a run takes, relative to others on the same data: images, and an overhead per forward."""
    known = METHODS.get(split_method(config.method)[0])
    overhead, together = (known.cost, config.whole(known.small) is not None) if known else (1.0, False)
    return config.epochs * (1 + 1.2 * overhead / (config.gradient_batch if together else config.batch))


def schedule(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """The order to run in: seed by seed and the reference first, so that a part of it already compares.

    Within a seed the longest come first, so that the processes end together.
    """
    return sorted(configs, key=lambda c: (c.seed, not is_reference(c), -cost(c)))


def compare(configs: Sequence[TrainConfig], folder: Path, jobs: int, display: Display) -> Outcome:
    """Does what is not yet done of `configs`, in the order of `schedule`.

    Raises:
        AnybatchError: a configuration does not fit, or the results cannot be written.
    """
    machine.check_device(configs[0].device)
    first = open_task(configs[0])
    keys = {config: run_key(first.other(config)) for config in configs}
    with Results(folder) as results:
        for warning in (*first.notes, *results.warnings):
            display.warn(warning)
        todo = schedule([c for c in configs if keys[c] not in results.runs])
        outcome = Outcome([], reused=len(configs) - len(todo))
        total = {c: c.epochs * c.updates(first.train_count) * c.gradient_batch for c in todo}
        costs = {c: cost(c) for c in todo}
        try:
            with (
                display.showing(total, costs, outcome.reused),
                closing(run_all(todo, jobs, folder / PICTURES)) as events,
            ):
                for event in events:
                    match event:
                        case Started(config):
                            display.start(config)
                        case Advanced(config, progress):
                            display.advance(config, progress)
                        case Finished(config, result):
                            results.add(result)
                            display.finish(config, result)
                        case Failed(config, reason):
                            outcome.failures.append((config, reason))
                            display.fail(config, reason)
        except KeyboardInterrupt:
            outcome.interrupted = True
        outcome.results = [results.runs[keys[c]] for c in configs if keys[c] in results.runs]
    return outcome
