"""The micro-batches of an update given at once: the same training, in one forward."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.lab import terminal
from anybatch.lab.classify import Classify
from anybatch.lab.compare import cost
from anybatch.lab.config import ClassifyConfig, TrainConfig
from anybatch.lab.networks import all_methods
from anybatch.lab.processes import ALONE
from anybatch.lab.report import facts_of
from anybatch.lab.results import parse
from anybatch.lab.schedule import Order
from anybatch.lab.training import optimizer_of, run_key, take_step, train_run

from . import lab_fakes
from .selection import usually
from .tolerances import ORACLE

DATA = lab_fakes.dataset(96, size=12)
CONFIG = ClassifyConfig(epochs=1, at_once=True, lr=0.05, gradient_batch=16)
VARIANTS = (
    "cbn(burn_in_steps='1/3')",
    "cbn(average_reductions='step')",
    "cbn(gradient='current', expansion='second_moment', pooling='equal')",
    "cbn(momentum_batch=None, running='torch')",
    "iebn(shortcuts='converted')",
    "iebn-cbn(shortcuts='converted')",
)


def together(config: ClassifyConfig) -> bool:
    return config.whole(config.norm(96)) is not None


def trained(config: ClassifyConfig) -> dict[str, torch.Tensor]:
    """Losses, weights and running statistics after five steps in float64, and what evaluation makes of them."""
    task = Classify(config, DATA)
    model, order, losses = task.build().double(), Order(0, 96, 96), list[torch.Tensor]()
    optimizer = optimizer_of(model, config)
    for step in range(5):
        batches = task.batches(order.after(16 * step, 16), 16 // config.batch, 16 * step)
        assert len(batches) == (1 if together(config) else 16 // config.batch)
        doubled = [(images.double(), labels) for images, labels in batches]
        losses.append(torch.stack(take_step(task, model, optimizer, doubled, ALONE)).mean())
    evaluated = model.eval()(batches[0][0][:1].double())
    return {"losses": torch.stack(losses), "evaluated": evaluated, **model.state_dict()}


@pytest.mark.parametrize("batch", usually((1, 8), [1, 2, 8]))
@pytest.mark.parametrize("method", [*all_methods("small-resnet"), *VARIANTS])
def test_training_is_the_same(method: str, batch: int) -> None:
    config = replace(CONFIG, method=method, batch=batch)
    if not together(config):
        assert Classify(config, DATA).batches(torch.arange(16), 16 // batch, 0)[0][0].shape[0] == batch
        return
    at_once, one_by_one = trained(config), trained(replace(config, at_once=False))
    for name, value in one_by_one.items():
        torch.testing.assert_close(at_once[name], value, **ORACLE, msg=lambda text, name=name: f"{name}: {text}")


def test_which_methods_go_at_once() -> None:
    gone = [m for m in all_methods("small-resnet") if together(replace(CONFIG, method=m, batch=2))]
    assert gone == [
        *("bn", "gn(groups=4)", "cbn", "cbn-naive", "ghost(examples_per_group=2)", "iebn", "iebn-cbn"),
        *("proxynorm", "proxynorm-group(groups=4)", "weighed", "nonorm"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"at_once": False},
        {"batch": 16},
        {"mode": "step"},
        {"device": "cuda"},
        {"method": "cbn(kind='ring')"},
        {"method": "cbn(positions=None)"},
        {"method": "cbn(examples_per_group=1)"},
        {"method": "cbn(sync=True)"},
        {"method": "ghost(examples_per_group=1)"},
        {"method": "iebn(examples_per_group=1)"},
        {"method": "iebn(sync=True)"},
        {"method": "iebn-cbn(sync=True)"},
        {"method": "weighed(sync=True)"},
    ],
    ids=str,
)
def test_what_does_not_go_at_once(changes: dict[str, object]) -> None:
    assert together(replace(CONFIG, method="cbn", batch=2))
    assert not together(replace(CONFIG, **{"method": "cbn", "batch": 2, **changes}))


def test_it_is_the_same_run_and_the_record_says_how_it_was_made() -> None:
    config = replace(CONFIG, method="cbn", batch=4)
    by_itself = replace(config, at_once=False)
    assert config == by_itself
    assert run_key(Classify(config, DATA)) == run_key(Classify(by_itself, DATA))
    for each in (config, by_itself):
        result = train_run(Classify(each, DATA))
        assert result.norm == repr(config.norm(96))
        assert result.config.at_once is parse(json.dumps(result.record())).config.at_once is each.at_once
        assert (("micro-batches", "at once where that computes the same") in facts_of([result])) is each.at_once


def test_it_is_planned_as_quicker() -> None:
    for method, quicker in {"cbn": True, "gn": True, "renorm": False, "no method": False}.items():
        config = replace(CONFIG, method=method, batch=1)
        assert (cost(config) < cost(replace(config, at_once=False))) is quicker


@pytest.mark.parametrize(("typed", "at_once"), [([], True), (["--at-once"], True), (["--one-by-one"], False)])
def test_compare_asks_for_it(typed: list[str], at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[TrainConfig]()
    monkeypatch.setattr(terminal, "compare", lambda configs, *rest: asked.extend(configs) or 0)
    assert CliRunner().invoke(app, ["compare", "--out", str(tmp_path), *typed]).exit_code == 0
    assert {config.record()["at_once"] for config in asked} == {at_once}
