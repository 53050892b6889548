"""Published rows, run anew: a seeded sample of them, and whether each comes out as it was published.

On the machine, with the versions and from the source that a row was published with, a run on the CPU is the same to
the digit. Elsewhere rounding differs, and training carries it far: how far it may is the tolerance, or, where a method
is less stable than that, how far the seeds of its row lie apart.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from anybatch.errors import AnybatchError, did_you_mean
from anybatch.lab import machine
from anybatch.lab.config import TrainConfig
from anybatch.lab.studies.planning import namer
from anybatch.lab.studies.publishing import published_runs
from anybatch.lab.studies.reading import shipped
from anybatch.lab.training import RunResult
from anybatch.lab.workers import Failed, Finished, run_all

__all__ = ["Checked", "Published", "Sample", "check", "draw"]


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        study: that published it.
        name: of the run, with what its study varies.
        run: as published.
        spread: from the lowest to the highest score of its row, over the published seeds, in points.
    """

    study: str
    name: str
    run: RunResult
    spread: float


@dataclass(frozen=True)
class Sample:
    """Published runs that are to be run anew.

    Attributes:
        runs: in the order drawn.
        published: how many there are.
        longer: of these left out since they took longer; likewise `elsewhere`, since they need a device that is not
            here.
    """

    runs: tuple[Published, ...]
    published: int
    longer: int
    elsewhere: int


@dataclass(frozen=True)
class Checked:
    """A published run beside the same run today.

    Attributes:
        published: the run.
        again: the run today; None if it failed.
        reason: why it failed.
        differs: what is not the same as when it was published: machine, versions, source.
        allowed: difference in points that counts as the same.
    """

    published: Published
    again: RunResult | None
    reason: str
    differs: tuple[str, ...]
    allowed: float

    @property
    def difference(self) -> float | None:
        """Today's score less the published one, in points; None unless both have one."""
        if self.again is None or self.again.accuracy is None or self.published.run.accuracy is None:
            return None
        return self.again.accuracy - self.published.run.accuracy

    @property
    def wrong(self) -> str:
        """What is off; "" if nothing is."""
        run = self.published.run
        if self.again is None:
            return f"it failed: {self.reason}"
        if self.again.fingerprint != run.fingerprint:
            return "the data are not those that it was published with"
        if self.again.key != run.key:
            return f"the method is {self.again.norm} today, published it was {run.norm}: publish the study again"
        if self.again.status != run.status:
            return f"it has {self.again.status}, published it had {run.status}"
        if self.difference is not None and abs(self.difference) > self.allowed:
            return f"it is {self.difference:+.2f} points from what was published, {self.allowed:.3g} are allowed"
        return ""


def draw(folder: Path, rows: int, seed: int, longest: float | None = None, study: str = "*") -> Sample:
    """A sample of the published runs; the same seed and files give the same.

    Args:
        folder: of published studies.
        rows: to draw; all if there are fewer.
        seed: of the draw.
        longest: seconds that a run may have taken; None: any.
        study: whose rows; all.

    Raises:
        AnybatchError: nothing is published there, or nothing that may be drawn, or a line is damaged.
    """
    if folder.suffix == ".toml":
        raise AnybatchError(f"--check takes the folder that {folder} was published in, or a study of the package")
    files = sorted(folder.glob(f"{study}.jsonl"))
    if not files:
        what, name = ("are no published studies", "NAME")
        if study != "*":
            there = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
            what, name = f"is no published study '{study}'{f' beside {there}' if there else ''}", study
        mend = f"give the folder that has some, or publish with anybatch study {name} --publish {folder}"
        mend = mend if folder.exists() else did_you_mean(str(folder), shipped(), mend)
        raise AnybatchError(f"there {what} in {folder}: {mend}")
    found: dict[str, Published] = {}  # a run that several studies share is one
    for file in files:
        runs = published_runs(file)
        called, spreads = namer(_varied(runs)), _spreads(runs)
        for run in runs:
            published = Published(file.stem, called(run.config), run, spreads[replace(run.config, seed=0)])
            found.setdefault(run.key, published)
    short = {key: each for key, each in found.items() if longest is None or each.run.seconds <= longest}
    here = _here({each.run.config.device for each in short.values()})
    eligible = [short[key] for key in sorted(short) if short[key].run.config.device in here]
    longer, elsewhere = len(found) - len(short), len(short) - len(eligible)
    if not eligible:
        raise AnybatchError(
            f"of {len(found)} published runs {longer} took longer than --longest (the shortest took "
            f"{min(each.run.seconds for each in found.values()):.0f} s) and {elsewhere} need a device that is not "
            f"here: nothing is left to check; give a larger --longest, or check where they can run"
        )
    drawn = random.Random(seed).sample(eligible, min(rows, len(eligible)))
    return Sample(tuple(drawn), len(found), longer, elsewhere)


def check(sample: Sample, jobs: int, tolerance: float, tell: Callable[[TrainConfig], None]) -> list[Checked]:
    """Runs a sample anew, in its order.

    Args:
        sample: of published runs.
        jobs: at a time.
        tolerance: points that a score may differ where machine, versions or source do, or on a GPU; where the seeds of
            its row lie farther apart, so many.
        tell: told of every run that has ended.
    """
    ends: dict[TrainConfig, Finished | Failed] = {}
    configs = list(dict.fromkeys(each.run.config for each in sample.runs))
    with closing(run_all(configs, jobs)) as events:
        for event in events:
            if isinstance(event, Finished | Failed):
                ends[event.config] = event
                tell(event.config)
    checked = []
    for each in sample.runs:
        end = ends[each.run.config]
        again, reason = (end.result, "") if isinstance(end, Finished) else (None, end.reason)
        differs = () if again is None else _differs(each.run, again)
        allowed = max(tolerance, each.spread) if differs or each.run.config.device != "cpu" else 0.0
        checked.append(Checked(each, again, reason, differs, allowed))
    return checked


def _differs(published: RunResult, again: RunResult) -> tuple[str, ...]:
    """What of machine, versions and source is not the same, or not known to be.

    Workers train with one thread, so their number needs no comparing.
    """
    found = [name for name in ("machine", "versions") if published.facts.get(name) != again.facts.get(name)]
    commit = published.facts.get("commit")
    if commit is None or commit.endswith("-dirty") or not machine.is_source_of(commit):
        found.append("source")
    return tuple(found)


def _varied(runs: Sequence[RunResult]) -> list[str]:
    """Fields that differ between runs, besides those that their names say."""
    records = [run.config.record() for run in runs]
    named = ("method", "batch", "seed", "at_once")  # the last makes no other run
    return [name for name in records[0] if name not in named and len({str(each[name]) for each in records}) > 1]


def _spreads(runs: Sequence[RunResult]) -> dict[TrainConfig, float]:
    """From the lowest to the highest score over the seeds, of every row."""
    scores: dict[TrainConfig, list[float]] = {}
    for run in runs:
        scores.setdefault(replace(run.config, seed=0), []).extend([] if run.accuracy is None else [run.accuracy])
    return {row: max(found, default=0.0) - min(found, default=0.0) for row, found in scores.items()}


def _here(devices: set[str]) -> set[str]:
    found = set()
    for device in devices:
        try:
            machine.check_device(device)
        except AnybatchError:
            continue
        found.add(device)
    return found
