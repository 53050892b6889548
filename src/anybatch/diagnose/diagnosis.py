"""All experiments on one model: run, kept together, put into words and numbers."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.eligible import batch_norms
from ..core.linear_map import LinearMap
from ..errors import AnybatchError
from ..inference.batches import examples_in
from ..layers.base import NormLayer
from ..layers.nonorm import NoNorm
from . import batch_noise, learning_rate
from .advice import Advice, about, recommend
from .experiments import EXPERIMENTS, Experiment, choose
from .findings import GIVEN, WITHOUT, Finding, Situation, judge
from .plain import plain
from .subject import Forward, Loss, Passes, Subject

__all__ = ["Diagnosis", "Progress", "diagnose"]


class Progress(NamedTuple):
    """Where a diagnosis stands.

    Attributes:
        done: of ``total``, in units of a forward pass.
        total: at most; a learning rate that diverges, say, ends early.
        doing: the title of the experiment that runs.
        seconds_left: by the pace so far, of two passes at first.
        passes: all there are to be, at most.
    """

    done: int
    total: int
    doing: str
    seconds_left: float
    passes: Passes


@dataclass(frozen=True)
class Diagnosis:
    """What came of it; ``print`` it, ``save`` it.

    Attributes:
        model: its class, parameters, linear maps and norms.
        findings: what was found, troubles first.
        advice: what to train with at the loader's batch size, where batch statistics could be measured.
        results: by experiment and subject ("as given", "without norms"), as its ``measure`` returns them.
        left_out: experiments, or subjects in them, that could not be measured, and why.
        notes: what else should be known.
        passes: that it took, besides three to look at the model and to estimate the time.
        seconds: likewise.
    """

    model: Mapping[str, Any]
    findings: tuple[Finding, ...]
    advice: Advice | None
    results: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    passes: Passes
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.model['class']}: {self.model['parameters']:,} parameters, {self.model['BatchNorms']} BatchNorms"
        ]
        lines += [f"  {kind:<8} {text}" for kind, text in self.statements()]
        if self.advice is not None:
            lines += [f"  {line}" for line in str(self.advice).splitlines()]
        return "\n".join(lines)

    def statements(self) -> list[tuple[str, str]]:
        """Everything worth a line, as (kind, text): findings, what else was measured, notes, what was left out."""
        told = {finding.experiment for finding in self.findings}
        lines = [(str(finding.level), finding.text) for finding in self.findings]
        lines += [("", self.said(name)) for name in self.results if name not in told]
        lines += [("note", note) for note in self.notes]
        return lines + [("left out", f"{name}: {why}") for name, why in self.left_out.items()]

    def said(self, name: str) -> str:
        """One experiment's results in words."""
        words: str = EXPERIMENTS[name].module.said(self.results[name])
        return words[:1].upper() + words[1:] + "."

    def figure(self, name: str) -> Any:
        """One experiment's figure; needs matplotlib."""
        return EXPERIMENTS[name].module.plot(self.results[name])

    def numbers(self) -> dict[str, Any]:
        """Every number, as plain values for JSON; what is not finite is None."""
        return {
            "model": dict(self.model),
            "findings": [plain(finding) for finding in self.findings],
            "advice": plain(self.advice),
            "results": plain(self.results),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "passes": plain(self.passes),
            "seconds": round(self.seconds, 1),
        }

    def save(self, folder: str | Path, command: str = "") -> Path:
        """Write report.html and diagnosis.json into ``folder``, made if need be; needs ``anybatch[lab]``.

        Args:
            folder: where to.
            command: what was typed, for the page.

        Returns:
            The page.

        Raises:
            AnybatchError: they cannot be written, or a package that they need is not there.
        """
        try:
            from . import report
        except ImportError as error:
            raise AnybatchError(f"the page of a diagnosis needs {error.name}: pip install 'anybatch[lab]'") from error

        return report.write(self, Path(folder), command)


@torch.enable_grad()
def diagnose(
    model: nn.Module | Callable[[], nn.Module],
    loader: Iterable[Any],
    loss: Loss,
    forward: Forward | None = None,
    batches: int = 8,
    test: Iterable[Any] = (),
    experiments: Sequence[str] | None = None,
    compare: bool = True,
    rate: float = 0.1,
    micro_batches: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Diagnosis:
    """Measure what normalization does for a model on its own data: the experiments of "Understanding Batch
    Normalization", and what a small batch does to batch statistics.

    Copies are measured; the model, its history and all random states are as before, whatever happens.

    Args:
        model: a module, or a function that builds one; at initialization, in training or trained.
        loader: gives batches; the first ``batches`` are used.
        loss: of (output, target), a single number, such as ``F.cross_entropy``; the target is the second item of a
            batch that is a tuple or list, and else the batch.
        forward: how to run the model on a batch; by default ``model(batch)``, of its first item for a tuple or list,
            ``model(**batch)`` for a dict.
        batches: to use.
        test: batches kept apart, to evaluate on after training at each learning rate.
        experiments: names, as ``anybatch diagnose --help`` lists them; all by default.
        compare: whether to measure the model without its norms (:class:`anybatch.NoNorm`) as well.
        rate: learning rate of the training, for what past statistics go through.
        micro_batches: batches whose gradients make one step of the optimizer, for the advice.
        options: by experiment, keyword arguments of its ``measure``: ``{"depth": {"batch": 1}}``.
        progress: told before the first pass what it will cost, and after every pass where it stands.

    Raises:
        AnybatchError: the model or loss fails on the first batch, or the loss is not a finite number there.
    """
    started = time.perf_counter()
    chosen, options = choose(experiments), options or {}
    for row in choose(list(options)):
        row.check(options[row.name])
    subject = Subject(model, loader, loss, batches, forward)
    around = about(subject, subject.check())
    facts, left_out = _facts(subject), {}
    batch = examples_in(subject.batches[0])
    notes = [] if len(subject.batches) == batches else [f"the loader gave {len(subject.batches)} of {batches} batches"]
    subjects = {GIVEN: subject}
    if compare and facts["BatchNorms"]:
        try:
            subjects[WITHOUT] = subject.converted(NoNorm())
        except AnybatchError as error:
            notes.append(f"not compared with the model without its norms: {str(error).removeprefix('convert_: ')}")
    tests = subject.placed(test)
    defaults: dict[str, dict[str, Any]] = {
        "batch-noise": {"sizes": tuple(sorted({*batch_noise.SIZES, batch}))},
        "history-error": {"rate": rate},
        "learning-rate": {"test": tests},
    }
    planned: list[tuple[Experiment, dict[str, Subject]]] = []
    for row in chosen:
        if row.needs_norms and not facts["BatchNorms"]:
            left_out[row.name] = f"the model has no BatchNorm; it has {facts['other norms'] or 'no norm of any kind'}"
        else:
            planned.append((row, subjects if row.compares else {GIVEN: subject.joined(row.reference)}))
    trainings = sum(len(measured) for row, measured in planned if row.module is learning_rate)
    tested = Passes(forward=trainings * len(learning_rate.RATES) * len(tests))
    told = _teller(subject, planned, tested, progress)
    before = subject.spent
    results: dict[str, Mapping[str, Any]] = {}
    for row, measured in planned:
        told(row.title)
        found, failed = row.run(measured, {**defaults.get(row.name, {}), **options.get(row.name, {})})
        if found:
            results[row.name] = found
        if not found and len(set(failed.values())) == 1:
            left_out[row.name] = next(iter(failed.values()))
        else:
            left_out |= {f"{row.name}, {name}" if len(measured) > 1 else row.name: why for name, why in failed.items()}
    findings = judge(results, Situation(batch, _trained(subject), bool(facts["torch's own"])))
    noise, history = (results.get(name, {}).get(GIVEN) for name in ("batch-noise", "history-error"))
    advice = None
    if noise is not None and not {batch, 8, 32} <= set(noise.sizes):
        notes.append(f"no advice: that takes batch-noise at sizes {batch}, 8 and 32")
    elif noise is not None and (history is not None or "history-error" in left_out):
        why = left_out.get("history-error", "")
        advice = recommend(noise, history, batch, micro_batches, why=why, **around)
    seconds = time.perf_counter() - started
    return Diagnosis(facts, findings, advice, results, left_out, tuple(notes), subject.spent - before, seconds)


def _trained(subject: Subject) -> bool:
    """Whether running statistics are something else than at first, where the norms have any."""

    def fresh(norm: _BatchNorm) -> bool:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if norm.num_batches_tracked is not None and int(norm.num_batches_tracked):
            return False
        return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())

    norms = [n for n in batch_norms(subject.copy()).values() if n.running_mean is not None]
    used = [n for n in norms if getattr(n, "uses_running", True)]
    return not used or not all(fresh(n) for n in used)


def _facts(subject: Subject) -> dict[str, Any]:
    model = subject.copy()
    norms = batch_norms(model)
    others = Counter(type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower())
    for norm in norms.values():
        others.pop(type(norm).__name__, None)
    tracked = [int(n.num_batches_tracked) for n in norms.values() if n.num_batches_tracked is not None]
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "linear maps": sum(LinearMap.of(module) is not None for module in model.modules()),
        "BatchNorms": len(norms),
        "kinds of norm": ", ".join(dict.fromkeys(type(norm).__name__ for norm in norms.values())),
        "other norms": ", ".join(f"{count} {name}" for name, count in others.items()),
        "batches tracked": max(tracked, default=0),
        "torch's own": not any(isinstance(norm, NormLayer) for norm in norms.values()),
        "batches": len(subject.batches),
        "examples a batch": examples_in(subject.batches[0]),
    }


def _teller(
    subject: Subject,
    planned: Sequence[tuple[Experiment, Mapping[str, Subject]]],
    besides: Passes,
    progress: Callable[[Progress], None],
) -> Callable[[str], None]:
    """Tells what all will cost, by the time of one forward and backward pass; then, given a title, after every pass."""
    total = sum((row.passes(subjects) for row, subjects in planned), besides)
    began, before = time.perf_counter(), subject.spent.cost
    model = subject.copy()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = subject.loss_of(model, subject.batches[0])
    if loss.requires_grad:
        subject.backward(loss, parameters)
    pace = (time.perf_counter() - began) / (subject.spent.cost - before)
    begun, start, title = subject.spent.cost, time.perf_counter(), ""

    def tell() -> None:
        done = subject.spent.cost - begun
        each = (time.perf_counter() - start) / done if done > 20 else pace
        progress(Progress(done, max(total.cost, done), title, each * max(0, total.cost - done), total))

    def doing(now: str) -> None:
        nonlocal title
        title = now
        tell()

    tell()
    subject.meter.listener = tell
    return doing
