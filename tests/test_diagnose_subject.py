"""What is measured: models and batches of every kind, left as they are; passes counted; what is refused, and how."""

import copy
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from anybatch.diagnose import Passes, Subject, depth, evaluation_gap, step_size

from .diagnose_nets import EVERY, D, Noise, Small, batches, chain, measured, same, squares, twin
from .small_models import shake
from .tolerances import ORACLE

ce = F.cross_entropy
every_measurement = pytest.mark.parametrize("name", EVERY)


TRIAL = {"batch-group": "batch-group(channel_groups=2)", "proxynorm-group": "proxynorm-group(groups=2)"}


class Stop(Exception):
    pass


def everything(model: nn.Module, taken: list) -> Any:
    """Whatever a measurement might change."""
    modules = list(model.modules())
    found = {
        "tensors": dict(model.state_dict()),
        "grads": [p.grad for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in modules],
        "hooks": [[len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)] for m in modules],
        "history": ab.history_state_dict(model),
        "batches": taken,
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad mode": torch.is_grad_enabled(),
    }
    return tree_map_only(Tensor, lambda t: t.tolist(), found)


@pytest.mark.parametrize("end", ["whole", "the loss raises", "stopped"])
@pytest.mark.parametrize("config", [None, ab.CBN()], ids=["bn", "cbn"])
@every_measurement
def test_the_model_and_the_random_states_are_left_as_they_are(name: str, config: object, end: str) -> None:
    """To the last bit, also where a measurement ends in the middle."""
    model, taken, losses = shake(chain(Noise()).double()), batches(2, 8), 0
    if config:
        ab.convert_(model, config, example_inputs=taken[0][0])
    for x, t in taken:
        ce(model(x), t).backward()
    model[4].eval()
    model[3].weight.requires_grad_(False)
    model[2].register_forward_hook(lambda *_: None)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        if end == "the loss raises" and losses == 3:
            raise ZeroDivisionError
        return ce(z, t)

    def passed() -> None:
        if end == "stopped" and subject.spent.cost >= 2:
            raise Stop

    before = everything(model, taken)
    subject = Subject(model, taken, loss, 2)
    subject.meter.listener = passed
    with suppress(Stop, ab.AnybatchError):
        measured(name, subject)
        assert {"whole": True, "the loss raises": losses < 3, "stopped": subject.spent.cost < 2}[end]
    assert everything(model, taken) == before


@every_measurement
def test_passes_are_those_that_are_counted(name: str) -> None:
    """With defaults, two batches, and enough examples for gradient_noise."""
    module, _ = EVERY[name]
    subject = Subject(chain(), batches(2, 33, torch.float32), lambda z, t: 0.01 * ce(z, t))
    assert subject.spent == Passes()
    wanted = module.passes(subject)
    assert subject.spent == Passes()
    module.measure(subject)
    assert subject.spent == wanted
    assert wanted.cost == wanted.forward + 2 * wanted.backward


def test_passes_of_a_gap_without_running_statistics() -> None:
    subject = Subject(chain(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).double(), batches(), ce)
    evaluation_gap.measure(subject)
    assert subject.spent == evaluation_gap.passes(subject)


@every_measurement
def test_a_function_gives_what_its_module_gives(name: str) -> None:
    """Built from seed 0; models and passes draw the same however the generators stand."""
    torch.manual_seed(0)
    model, taken = chain(Noise()), batches(2, 6, torch.float32)
    wanted = measured(name, Subject(model, taken, ce))
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    same(measured(name, Subject(lambda: chain(Noise()), taken, ce)), wanted)


@every_measurement
def test_batches_by_name(name: str) -> None:
    """A batch that is a dict is run by ``forward`` and is its own target."""
    model, taken = chain().double(), batches(2, 6)
    wanted = measured(name, Subject(model, taken, ce))
    by_name = [{"pixels": x, "label": t} for x, t in taken]
    found = measured(
        name, Subject(model, by_name, lambda z, b: ce(z, b["label"]), forward=lambda model, b: model(b["pixels"]))
    )
    if name == "learning_rate":  # what is no classification has no accuracy
        assert found.accuracy.isnan().all()
        found = dataclass_with(found, accuracy=wanted.accuracy)
    if name == "evaluation_gap":
        found = dataclass_with(found, accuracies=wanted.accuracies)
    same(found, wanted)


def dataclass_with(found: Any, **fields: Any) -> Any:
    other = copy.copy(found)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def test_what_a_batch_may_be() -> None:
    """A tensor; a list; a dict of the model's arguments; a loader of pairs, whose first batches are kept."""
    model, data = Small().double(), torch.randn(7, 3, 5, 7, dtype=D)
    loader = DataLoader(TensorDataset(data, torch.randint(5, (7,))), batch_size=3, shuffle=True)
    for loader_of_one in ([data], [[data]], [{"image": data}], iter([data, data + 1])):
        found = depth.measure(Subject(model, loader_of_one, squares, 1))
        same(found, depth.measure(Subject(model, [(data, None)], squares, 1)))
    once, again = (Subject(model, loader, ce, 2).batches for _ in range(2))
    assert len(once) == 2
    torch.testing.assert_close(once, again)


def test_an_iterator_that_ends_early_or_never() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.randn(2, 3, 5, 7)

    subject = Subject(Small(), iter(batches(3)), ce, 8)
    assert len(subject.batches) == 3
    assert len(Subject(Small(), endless(), squares, 4).batches) == 4


def test_regrouped() -> None:
    """The same examples in the same order; what is left over is dropped."""
    model, taken = Small().double(), batches(3, 4)
    subject = Subject(model, taken, ce)
    other = subject.regrouped(5)
    x, t = (torch.cat(parts) for parts in zip(*taken, strict=True))
    torch.testing.assert_close(list(other.batches), [(x[:5], t[:5]), (x[5:10], t[5:10])])
    assert [tuple(b.shape) for b in Subject(model, [x], squares).regrouped(3).batches] == [(3, 3, 5, 7)] * 4
    depth.measure(other)
    assert subject.spent == other.spent == Passes(1)


@pytest.mark.parametrize(("size", "made"), [(3, [4, 4, 4]), (4, [4, 4, 4]), (5, [5, 5]), (64, [12])])
def test_joined(size: int, made: list[int]) -> None:
    """Batches that are large enough stay; fewer examples in all are one batch; what cannot be joined stays too."""
    subject = Subject(Small().double(), batches(3, 4), ce)
    assert [len(x) for x, _ in subject.joined(size).batches] == made
    by_name = Subject(Small(), [{"image": torch.randn(2, 3, 5, 7)}] * 2, squares)
    assert by_name.joined(size).batches == by_name.batches


@torch.no_grad()
def test_without_norms() -> None:
    """The maps' outputs by hand, with each norm's own scale and shift; None where there is no norm."""
    model = shake(chain().double())
    x, t = batches(1)[0]
    found = depth.measure(Subject(model, [(x, t)], ce).without_norms())
    y = model[0](x)
    z = model[3](F.relu(y * model[1].weight[:, None, None] + model[1].bias[:, None, None]))
    wanted = torch.stack([out.var((0, 2, 3), correction=0).mean() for out in (y, z)])
    torch.testing.assert_close(found.var[:2], wanted, **ORACLE)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert Subject(chain(norm=lambda c: nn.GroupNorm(2, c)).double(), [(x, t)], ce).without_norms() is None


@pytest.mark.parametrize("kind", [ab.CBN(), ab.BatchRenorm()], ids=lambda config: type(config).__name__)
def test_the_loss_after_a_step_depends_on_its_size_alone(kind: object) -> None:
    """Not on the steps that were tried before it, also for norms that remember."""
    subject = Subject(chain().double(), batches(2, 8), ce).converted(kind)
    many, one = step_size.measure(subject, steps=(0.0, 0.1, 1.0)), step_size.measure(subject, steps=(1.0,))
    assert many.ratio[0] == pytest.approx(1)
    assert many.ratio[2] == pytest.approx(float(one.ratio[0]))


@pytest.mark.parametrize("name", ["step_size", "cancellation", "learning_rate", "evaluation_gap", "history_error"])
@pytest.mark.parametrize("method", [name for name in ab.METHODS if name != "gn"])
def test_models_that_are_converted(method: str, name: str) -> None:
    """By every method, those too that must know of the optimizer's steps or are set up at the first batch."""
    model, taken = chain(), batches(2, 8, torch.float32)
    ab.convert_(model, ab.parse_method(TRIAL.get(method, ab.METHODS[method].trial)), example_inputs=taken[0][0])
    assert measured(name, Subject(model, taken, ce))


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_an_input_that_is_changed_in_place() -> None:
    """Neither the user's batches nor the next measurement's."""
    x = torch.randn(4, 3, 5, 7)
    before = x.clone()
    subject = Subject(nn.Sequential(InPlace(), nn.Conv2d(3, 2, 3)), [x], squares)
    found = depth.measure(subject)
    assert torch.equal(x, before)
    same(depth.measure(subject), found)


def test_a_function_that_gives_the_same_module_again() -> None:
    """It is the user's model then, and a measurement must not train it."""
    model, taken = chain().double(), batches(2, 4)
    before = everything(model, taken)
    with suppress(ab.AnybatchError):
        measured("learning_rate", Subject(lambda: model, taken, ce))
    assert everything(model, taken) == before


def test_a_subjects_copies_have_the_models_history() -> None:
    """And a life of their own."""
    model, taken = chain().double(), batches(2, 8)
    ab.convert_(model, ab.CBN(), example_inputs=taken[0][0])
    for x, _ in taken:
        model(x)
    subject = Subject(model, taken, ce)
    with torch.no_grad():
        wanted = twin(model)(taken[0][0])
        torch.testing.assert_close(subject.output(subject.copy(), taken[0]), wanted, rtol=0, atol=0)
        fresh = copy.deepcopy(model).train()
        for norm in (fresh[1], fresh[4]):
            norm.histories = {}
        assert not torch.equal(fresh(taken[0][0]), wanted)
