"""ab.diagnose of models of every kind: each has results or reasons, and nothing else raises."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import EXPERIMENTS

from . import small_models as models
from .diagnose_nets import batches, chain, squares
from .test_diagnose_subject import TRIAL
from .test_diagnosis import GIVEN, SHORT, float_batches, short

ce = F.cross_entropy


def images(count: int = 2, examples: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(examples, 3, 9, 10), torch.randint(5, (examples,))) for _ in range(count)]


def first(z: Any, _: object) -> Tensor:
    return squares(models.flat(z)[0], None)


def half() -> tuple[nn.Module, list]:
    return chain().bfloat16(), [(x.bfloat16(), t) for x, t in images()]


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "an auxiliary head": (models.ResNet, first),
    "levels": (lambda: models.SharedHead(per_level=False), first),
    "a shared norm": (models.SharedNorm, first),
    "norms of no map": (models.Unpairable, first),
    "norms of a map at times": (models.Sometimes, first),
    "a norm inside its map": (lambda: nn.Sequential(models.ConvNorm(3, 5, 3, norm=nn.BatchNorm2d(5))), first),
    "a residue": (lambda: models.Residue("output"), first),
    "computed weights": (lambda: nn.Sequential(models.parametrized("weight_norm"), nn.BatchNorm2d(5)), first),
    "Linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(270, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)), ce),
    "in evaluation": (lambda: chain().eval(), ce),
}


def whole(found: ab.diagnose.Diagnosis) -> None:
    for name in EXPERIMENTS:
        there = set(found.results.get(name, ()))
        missing = {key for key in found.left_out if key.partition(",")[0] == name}
        assert there or missing
        assert not {f"{name}, {key}" for key in there} & missing
    assert all(found.left_out.values())
    assert json.dumps(found.numbers(), allow_nan=False)
    assert str(found)


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str) -> None:
    make, loss = MODELS[kind]
    whole(short(make(), images(), loss))


def test_batches_of_arguments() -> None:
    taken = [{"image": x, "steps": 2} for x, _ in images()]
    whole(short(models.Steps(), taken, squares))


def test_low_precision() -> None:
    whole(short(*half(), ce))


def test_uneven_batches() -> None:
    """And a loader that gives them in an order of its own."""
    whole(short(chain(), [*images(2, 8), *images(1, 3)]))


@pytest.mark.parametrize("method", ab.METHODS)
def test_models_that_are_converted(method: str) -> None:
    model, taken = chain(), float_batches()
    ab.convert_(model, ab.parse_method(TRIAL.get(method, "gn(groups=2)" if method == "gn" else method)),
                example_inputs=taken[0][0])  # fmt: skip
    chosen = ["depth", "logit-gradients", "learning-rate", "evaluation-gap"]
    found = ab.diagnose(model, taken, ce, batches=2, experiments=chosen, options=SHORT)
    assert set(found.results) | set(found.left_out) == set(chosen)
    assert ("evaluation-gap" in found.results) == (method != "gn")


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


FIXED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(chain()), "revert it to BatchNorm first"),
    "a forward of its own": (lambda: chain(norm=OwnForward), "OwnForward has a forward of its own"),
    "the norm alone": (lambda: nn.BatchNorm2d(3), "the model itself is a BatchNorm2d"),
}


@pytest.mark.parametrize("kind", FIXED)
def test_norms_that_cannot_be_taken_out(kind: str) -> None:
    """There is nothing to compare with, and it is said why; the model itself is measured."""
    make, why = FIXED[kind]
    found = ab.diagnose(make(), float_batches(), squares, experiments=["step-size", "evaluation-gap"])
    assert all(list(at) == [GIVEN] for at in found.results.values())
    assert any(why in reason for reason in [*found.left_out.values(), *found.notes])


def test_a_model_that_is_not_trained() -> None:
    """Its statistics can be measured all the same; what needs gradients cannot."""
    found = short(chain().requires_grad_(False), float_batches())
    assert {"depth", "batch-noise", "evaluation-gap", "gaussian-products"} <= set(found.results)
    why = {key.partition(",")[0]: reason for key, reason in found.left_out.items()}
    assert "depend on any parameter that is trained" in why["step-size"]
    assert {"step-size", "learning-rate", "history-error"} <= set(why)


def test_without_gradients_around_it() -> None:
    """Where a notebook has them off."""
    model, taken = chain(), batches(2, 8, torch.float32)
    with torch.no_grad():
        found = ab.diagnose(model, taken, ce, experiments=["step-size"], compare=False)
        assert not torch.is_grad_enabled()
        assert ab.advise(model, taken, ce, 2).batch == 2
    assert set(found.results) == {"step-size"}


def test_one_experiment_by_its_name_alone() -> None:
    assert set(ab.diagnose(chain(), float_batches(), ce, experiments="depth").results) == {"depth"}
