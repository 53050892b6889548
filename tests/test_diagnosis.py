"""ab.diagnose: all experiments on one model; what cannot be measured, wrong names, and what it leaves alone."""

import dataclasses
import json
import random
import subprocess
import sys
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import EXPERIMENTS, Diagnosis, Progress, Subject

from .diagnose_nets import EVERY, Noise, batches, chain, same
from .small_models import shake
from .test_diagnose_subject import everything

ce = F.cross_entropy
SHORT = {name.replace("_", "-"): dict(short) for name, (_, short) in EVERY.items()}
SHORT["batch-noise"] = {"sizes": (1, 8, 32)}
GIVEN, WITHOUT = "as given", "without norms"
every_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


def float_batches(count: int = 2, examples: int = 8) -> list[tuple[Tensor, Tensor]]:
    return batches(count, examples, torch.float32)


def short(model: object, taken: list, loss: Any = ce, **more: Any) -> Diagnosis:
    """All experiments, each as short as can be."""
    return ab.diagnose(model, taken, loss, batches=len(taken), options=SHORT, **more)


class Whole(NamedTuple):
    model: nn.Module
    taken: list
    test: list
    found: Diagnosis
    told: list[Progress]
    at_first: int


@pytest.fixture(scope="module")
def whole() -> Whole:
    torch.manual_seed(0)
    model, taken, test, told, losses = chain(Noise()), float_batches(), float_batches(1), [], [0]

    def loss(z: Tensor, t: Tensor) -> Tensor:
        losses.append(losses[-1] + (not told))
        return ce(z, t)

    found = short(model, taken, loss, test=test, progress=told.append)
    return Whole(model, taken, test, found, told, losses[-1])


@every_experiment
def test_results_are_what_each_experiment_measures(whole: Whole, name: str) -> None:
    """With its options, of the model and, where that compares, of the model without its norms."""
    row = EXPERIMENTS[name]
    found = whole.found.results[name]
    assert list(found) == ([GIVEN, WITHOUT] if row.compares else [GIVEN])
    subject = Subject(whole.model, whole.taken, ce)
    bare = subject.without_norms()
    options = {**SHORT[name], **({"test": whole.test} if name == "learning-rate" else {})}
    for key, measured in found.items():
        of = {GIVEN: subject.joined(row.reference), WITHOUT: bare}[key]
        same(measured, row.module.measure(of, **options))


def test_what_else_it_says(whole: Whole) -> None:
    found = whole.found
    assert list(found.results) == list(EXPERIMENTS)
    assert (dict(found.left_out), found.notes) == ({}, ())
    assert found.model["parameters"] == sum(p.numel() for p in whole.model.parameters())
    assert (found.model["BatchNorms"], found.model["linear maps"], found.model["examples a batch"]) == (2, 3, 8)
    lines = str(found).splitlines()
    assert lines[0].startswith("Sequential: ")
    assert all(any(finding.text in line for line in lines) for finding in found.findings)
    assert {finding.experiment for finding in found.findings} <= set(EXPERIMENTS)
    assert str(found.advice).splitlines()[0] in str(found)


def unfold(thing: Any, plain: Any) -> list[tuple[Any, Any]]:
    """Every dataclass in it, and what ``numbers`` makes of that."""
    pairs: Any = ()
    if dataclasses.is_dataclass(thing):
        pairs = [(getattr(thing, key), item) for key, item in plain.items()]
    elif isinstance(thing, dict):
        assert [str(key) for key in thing] == list(plain)
        pairs = zip(thing.values(), plain.values(), strict=True)
    elif isinstance(thing, tuple):
        pairs = zip(thing, plain, strict=True)
    inside = [part for pair in pairs for part in unfold(*pair)]
    return [(thing, plain), *inside] if dataclasses.is_dataclass(thing) else inside


def test_numbers_hold_every_field_and_property(whole: Whole) -> None:
    """As JSON that every reader takes."""
    found, numbers = whole.found, whole.found.numbers()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert list(numbers) == [field.name for field in dataclasses.fields(Diagnosis)]
    parts = [
        part
        for key in ("results", "advice", "findings", "passes")
        for part in unfold(getattr(found, key), numbers[key])
    ]
    assert len(parts) > 2 * len(EXPERIMENTS)
    for thing, plain in parts:
        properties = {key for key, item in vars(type(thing)).items() if isinstance(item, property)}
        assert set(plain) == {field.name for field in dataclasses.fields(thing)} | properties
    depth = found.results["depth"][GIVEN]
    assert numbers["results"]["depth"][GIVEN]["var"] == depth.var.tolist()
    assert numbers["results"]["depth"][GIVEN]["growth"] == depth.growth


def test_progress(whole: Whole) -> None:
    """The cost before the first pass of an experiment, then after every pass; the experiments in their order."""
    first, *later = told = whole.told
    assert (first.done, first.doing, whole.at_first) == (0, "", 2)  # the check, and what it takes the time of
    assert first.total == first.passes.cost
    assert [now.done for now in told] == sorted(now.done for now in told)
    assert all(now.total >= now.done and now.seconds_left >= 0 for now in told)
    assert list(dict.fromkeys(now.doing for now in later)) == [row.title for row in EXPERIMENTS.values()]
    assert told[-1].done == whole.found.passes.cost


@pytest.mark.parametrize("tested", [0, 2])
def test_the_cost_that_is_told_is_not_exceeded(tested: int) -> None:
    model, told = nn.Sequential(nn.Flatten(), nn.Linear(105, 5), nn.BatchNorm1d(5)), []
    chosen = ["learning-rate", "evaluation-gap", "history-error"]
    ab.diagnose(
        model, float_batches(1, 2), ce, test=float_batches(tested), experiments=chosen, compare=False,
        progress=told.append,
    )  # fmt: skip
    assert {now.total for now in told} == {told[0].total}


def test_the_same_again_whatever_the_random_states() -> None:
    def numbers() -> dict[str, Any]:
        return {**short(model, taken).numbers(), "seconds": 0}

    torch.manual_seed(0)
    model, taken = chain(Noise()), float_batches()
    once = numbers()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    assert numbers() == once


class Stop(BaseException):
    pass


@pytest.mark.parametrize("end", ["whole", "the loss raises", "stopped"])
@pytest.mark.parametrize("config", [None, ab.CBN()], ids=["bn", "cbn"])
def test_the_model_and_the_random_states_are_left_as_they_are(config: object, end: str) -> None:
    """To the last bit, also if the loss raises from some pass on, or the caller stops it."""
    model, taken, losses = shake(chain(Noise())), float_batches(), 0
    if config:
        ab.convert_(model, config, example_inputs=taken[0][0])
    for x, t in taken:
        ce(model(x), t).backward()
    model[4].eval()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        if end == "the loss raises" and losses > 30:
            raise ZeroDivisionError
        return ce(z, t)

    def told(progress: Progress) -> None:
        if end == "stopped" and progress.done > 30:
            raise Stop

    before = everything(model, taken)
    with suppress(Stop):
        found = short(model, taken, loss, progress=told)
        assert end != "stopped"
        assert ("ZeroDivisionError" in str(found.left_out)) == (end == "the loss raises")
    assert everything(model, taken) == before


def test_a_choice() -> None:
    """In the table's order; without a comparison the model alone; fewer batches than asked for are noted."""
    taken = float_batches()
    found = ab.diagnose(chain(), taken, ce, experiments=["step-size", "depth"], compare=False)
    assert [list(at) for at in found.results.values()] == [[GIVEN], [GIVEN]]
    assert list(found.results) == ["depth", "step-size"]
    assert found.notes == ("the loader gave 2 of 8 batches",)
    assert found.advice is None
    assert not ab.diagnose(chain(), taken, ce, experiments=[]).results


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"experiments": ["dept"]}, "there is no experiment 'dept'; did you mean depth or"),
        ({"options": {"batch_noise": {}}}, "there is no experiment 'batch_noise'; did you mean batch-noise"),
        ({"experiments": ["depth"], "options": {"depth": {"bach": 1}}}, "depth has no option 'bach'; it has batch"),
        ({"forward": 8}, "forward is a int; give a function of"),
        ({"experiments": ["xyz"]}, "did you mean depth or step-size or .* or history-error"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AnybatchError, match=words):
        ab.diagnose(chain(), float_batches(), ce, **given)


def test_a_model_without_batchnorm() -> None:
    """What is about batch statistics is left out, with what norms there are; nothing is compared."""
    found = short(chain(norm=lambda c: nn.GroupNorm(2, c)), float_batches())
    about_batches = {name for name, row in EXPERIMENTS.items() if row.needs_norms}
    assert dict(found.left_out) == dict.fromkeys(about_batches, "the model has no BatchNorm; it has 2 GroupNorm")
    assert {tuple(at) for at in found.results.values()} == {(GIVEN,)}
    assert set(found.results) == set(EXPERIMENTS) - about_batches
    assert found.advice is None
    assert found.model["other norms"] == "2 GroupNorm"
    # Fails: "left outbatch-noise".
    assert "  left out batch-noise: the model has no BatchNorm; it has 2 GroupNorm\n" in str(found)
    bare = ab.diagnose(nn.Sequential(nn.Flatten(), nn.Linear(105, 5)), float_batches(), ce, experiments=["batch-noise"])
    assert bare.left_out == {"batch-noise": "the model has no BatchNorm; it has no norm of any kind"}


class ByName(nn.Module):
    """Takes and puts out what has names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(image)}


def test_an_output_by_name() -> None:
    """What needs one tensor is left out and says so; the rest is measured, the same as of the tensor."""
    taken, model = float_batches(), ByName()
    by_name = [{"image": x, "label": t} for x, t in taken]
    found = short(
        model, by_name, lambda z, batch: ce(z["logits"], batch["label"]), forward=lambda m, batch: m(batch["image"])
    )
    refused = {"logit-gradients", "gradient-noise"}
    assert {name.partition(",")[0] for name in found.left_out} == refused
    assert all("a dict" in why for why in found.left_out.values())
    assert set(found.results) == set(EXPERIMENTS) - refused
    wanted = short(model.body, taken)
    for name in ("step-size", "cancellation", "history-error"):
        mine, theirs = found.results[name][GIVEN], wanted.results[name][GIVEN]
        same(dataclasses.replace(mine, names=()) if hasattr(mine, "names") else mine,
             dataclasses.replace(theirs, names=()) if hasattr(theirs, "names") else theirs)  # fmt: skip


def test_the_library_alone() -> None:
    """Neither matplotlib nor jinja2; the package is called by its main function's name; its parts are there."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "jinja2", "markupsafe")))
import torch, anybatch as ab
from torch import nn
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
taken = [(torch.randn(8, 12), torch.randint(4, (8,)))]
found = ab.diagnose(model, taken, nn.functional.cross_entropy, experiments=["depth", "step-size", "batch-noise"])
print(found, found.numbers()["passes"], found.said("depth"))
subject = ab.diagnose.Subject(model, taken, nn.functional.cross_entropy)
assert callable(ab.diagnose) and ab.diagnose.depth.measure(subject).growth == found.results["depth"]["as given"].growth
try:
    found.save("nowhere")
except ab.AnybatchError as error:
    assert "pip install 'anybatch[lab]'" in str(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
