"""ab.Monitor: what it logs and when, that training is the same with it, and when it warns."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.diagnose import Subject, evaluation_gap
from anybatch.diagnose.monitor import _sampled

from .diagnose_nets import Batch, Noise, batches, chain, twin
from .small_models import shake
from .test_diagnose_subject import TRIAL

ce = F.cross_entropy
NAMES = ("gap", "gap_max", "mean_gap", "sd_gap")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def small(count: int = 1, examples: int = 3) -> list[Batch]:
    """Images of which every position is looked at: at most 64 values of a channel in each norm's output."""
    return [
        (torch.randn(examples, 3, 4, 5, dtype=torch.float64) + 1, torch.randint(5, (examples,))) for _ in range(count)
    ]


def test_every_few_training_forwards() -> None:
    """Whatever evaluates in between, or runs without gradients, is none; the dict's names have the prefix."""
    model, logged, taken = chain().double(), [], small(7)
    monitor = ab.Monitor(model, logged.append, every=3, prefix="norms/")
    for step, (x, _) in enumerate(taken):
        model(x)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        model.train()
        assert len(logged) == (step + 1) // 3
    assert monitor.forwards == 7
    assert tuple(logged[0]) == tuple(f"norms/{name}" for name in NAMES)
    assert logged[1] == monitor.last
    assert all(type(value) is float for value in monitor.last.values())


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int | None]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.written.append((tag, scalar_value, global_step))


def test_a_writer_gets_the_number_of_forwards() -> None:
    model, writer = chain().double(), Writer()
    monitor = ab.Monitor(model, writer, every=2)
    for x, _ in small(5):
        model(x)
    assert [(tag, step) for tag, _, step in writer.written] == [(f"anybatch/{n}", k) for k in (2, 4) for n in NAMES]
    assert {tag: value for tag, value, _ in writer.written[4:]} == monitor.last


@pytest.mark.parametrize("examples", [2, 3])
def test_the_gap_is_that_of_evaluation_gap(examples: int) -> None:
    """Of this batch with the running statistics as they were; those of the moments with the batch in them."""
    model, (batch,) = shake(chain().double()), small(1, examples)
    before = evaluation_gap.measure(Subject(model, [batch], ce, 1))
    monitor = ab.Monitor(model, every=1)
    seen = []
    for norm in (model[1], model[4]):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    model(batch[0])
    by_hand = []
    for norm, x in zip((model[1], model[4]), seen[-2:], strict=True):  # before them, those of the evaluation
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0) + norm.eps
        then = norm.running_var + norm.eps
        by_hand.append([((mean - norm.running_mean).square() / then).mean(), ((var / then).log() / 2).square().mean()])
    of_moments = torch.tensor(by_hand).mean(0).sqrt()
    wanted = [before.overall, float(before.gap.max()), *of_moments.tolist()]
    assert list(monitor.last.values()) == pytest.approx(wanted, rel=1e-9)


def test_the_gap_of_evaluation_alone_is_zero() -> None:
    """Of norms that are frozen while the model trains."""
    model = shake(chain().double())
    monitor = ab.Monitor(model, every=1)
    model[1].eval()
    model[4].eval()
    model(small()[0][0])
    assert (monitor.last["anybatch/gap"], monitor.last["anybatch/gap_max"]) == (0, 0)


@pytest.mark.parametrize(
    ("examples", "height", "width"), [(64, 8, 8), (1, 64, 64), (4, 32, 32), (32, 16, 16), (3, 7, 9)]
)
def test_the_positions_are_spread(examples: int, height: int, width: int) -> None:
    """Over examples, rows and columns: no more than a quarter of them in one row or column of the images."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([rows, columns]).expand(examples, 2, height, width)
    seen = _sampled(torch.cat([images, torch.arange(examples).view(-1, 1, 1, 1).expand(-1, 1, height, width)], 1))
    assert 32 <= len(seen) <= 64
    assert len(seen.unique(dim=0)) > 0.8 * len(seen)
    assert len(seen[:, 2].unique()) >= min(examples, 16)
    for column in (0, 1):
        assert seen[:, column].unique(return_counts=True)[1].max() <= len(seen) / 4


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def train(model: nn.Module, taken: list[Batch], watched: bool, forward: Any = None, **more: Any) -> tuple[Any, ...]:
    """Losses, parameters, buffers, histories and random states of a training."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    optimizer, losses, logged = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), [], []
    ab.attach(model, optimizer)
    monitor = ab.Monitor(model, logged.append, every=2, **more) if watched else None
    for step, (x, t) in enumerate(taken):
        loss = ce((forward or nn.Module.__call__)(model, x.clone()).float(), t)
        loss.backward()
        losses.append(loss.item())
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    if monitor is not None:
        monitor.remove()
        assert len(logged) == len(taken) // 2
        assert hooks(model) == model.hooks_before
    history = ab.history_state_dict(model)
    return losses, {key: t.tolist() for key, t in model.state_dict().items()}, flat(history), generators()


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def same_training(model: nn.Module, taken: list[Batch], forward: Any = None) -> None:
    model.hooks_before = hooks(model)
    other = twin(model)
    assert train(model, taken, True, forward) == train(other, taken, False, forward)


@pytest.mark.parametrize("method", [name for name in ab.METHODS if name != "gn"])
def test_training_is_the_same_with_it(method: str) -> None:
    """To the last bit, with dropout and the like; two micro-batches a step; observed often enough to recalibrate."""
    model, taken = chain(nn.Dropout(0.3), Noise()), batches(24, 4, torch.float32)
    typed = TRIAL.get(method, ab.METHODS[method].trial)
    ab.convert_(model, ab.parse_method(typed), example_inputs=taken[0][0])
    same_training(model, taken)


class Count(nn.Module):
    """Its output depends on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * self.runs


@pytest.mark.parametrize("first", [nn.LeakyReLU(0.1, inplace=True), Count()], ids=["in place", "counts"])
def test_training_is_the_same_of_a_model_that_changes_things(first: nn.Module) -> None:
    """Its input, or its own buffers in whatever mode it runs."""
    same_training(nn.Sequential(first, *chain()), batches(4, 4, torch.float32))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.parts, self.reentrant = nn.Sequential(*(chain()[k : k + 3] for k in (0, 3)), chain()[6:]), reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.parts
        return last(checkpoint(middle, first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_is_the_same_under_checkpointing(reentrant: bool) -> None:
    same_training(Checkpointed(reentrant), batches(4, 4, torch.float32))


@pytest.mark.parametrize("method", ["bn", "cbn"])
def test_training_is_the_same_under_autocast(method: str) -> None:
    """The weights that it casts without gradients are not those that training gets."""
    model, taken = chain(), batches(4, 4, torch.float32)
    ab.convert_(model, ab.parse_method(method), example_inputs=taken[0][0])

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    same_training(model, taken, forward)


def test_what_is_wrapped_is_watched_inside() -> None:
    model, logged = chain().double(), []
    ab.Monitor(nn.DataParallel(model), logged.append, every=1)
    model(small()[0][0])
    assert len(logged) == 1


def test_two_at_once() -> None:
    """Each finds what it would find alone."""
    (x, _), found = small()[0], []
    model = shake(chain().double())
    for count in (1, 2):
        other = copy.deepcopy(model)
        monitors = [ab.Monitor(other, every=1) for _ in range(count)]
        other(x)
        found += [monitor.last for monitor in monitors]
    assert found[0] == found[1] == found[2]
