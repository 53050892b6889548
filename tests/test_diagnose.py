"""The experiments of "Understanding Batch Normalization", each against its equations: moments, steps, rates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.diagnose import (
    Subject,
    depth,
    diverging_step,
    gaussian_products,
    learning_rate,
    step_size,
)

from .diagnose_nets import Batch, D, Noise, Small, batches, chain, deep, small, squares, stepped, twin
from .oracle import batch_moments, normalise
from .tolerances import ORACLE, REORDERED

ce = F.cross_entropy


def hand_forward(m: Small, x: Tensor) -> list[Tensor]:
    """What each map puts out, in order of the calls."""
    first = F.conv2d(x, m.conv.weight, m.conv.bias, 2, 1)
    y = F.relu(normalise(first, *batch_moments(first), m.bn.weight, m.bn.bias, m.bn.eps))
    second = F.conv2d(y, m.twice.weight, padding=1)
    third = F.conv2d(F.relu(second), m.twice.weight, padding=1)
    return [first, second, third, third.mean((2, 3)) @ m.fc.weight.t() + m.fc.bias]


@torch.no_grad()
def test_depth() -> None:
    """Moments of every call, by a forward written out; of the batch that is asked for."""
    model, subject = small(2)
    found = depth.measure(subject, batch=1)
    rows = [batch_moments(y) for y in hand_forward(model, subject.batches[1][0])]
    assert found.names == ("conv", "twice", "twice", "fc")
    torch.testing.assert_close(found.mean, torch.stack([mean.abs().mean() for mean, _ in rows]), **ORACLE)
    torch.testing.assert_close(found.var, torch.stack([var.mean() for _, var in rows]), **ORACLE)
    assert found.growth == pytest.approx(float(rows[-1][1].mean() / rows[0][1].mean()))


@torch.no_grad()
def test_depth_of_a_linear_on_sequences() -> None:
    """Its channels are last."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), torch.randn(3, 5, 3, dtype=D)
    found = depth.measure(Subject(model, [x], lambda z, _: z.mean()))
    means, variances = zip(*(batch_moments(y.flatten(0, 1)) for y in (model[0](x), model(x))), strict=True)
    torch.testing.assert_close(found.mean, torch.stack([mean.abs().mean() for mean in means]), **ORACLE)
    torch.testing.assert_close(found.var, torch.stack([var.mean() for var in variances]), **ORACLE)


def test_step_size() -> None:
    """Parameters of a copy moved by hand; the sizes in ascending order."""
    model, subject = small(2)
    found = step_size.measure(subject, batch=1, steps=(0.7, 0.01, 30.0))
    x, t = subject.batches[1]
    loss = ce(twin(model)(x), t).item()
    assert found.steps.tolist() == [0.01, 0.7, 30.0]
    assert found.loss == pytest.approx(loss)
    ratio = [ce(stepped(model, (x, t), a)(x), t).item() / loss for a in found.steps.tolist()]
    torch.testing.assert_close(found.ratio, torch.tensor(ratio, dtype=D), **ORACLE)


def test_step_size_says_what_lowers_the_loss_and_what_diverges() -> None:
    def of(*ratio: float) -> step_size.StepSizes:
        return step_size.StepSizes(torch.arange(1.0, 1 + len(ratio)), torch.tensor(ratio), 1.0)

    assert of(0.9, 1.1, 0.8, 1.2, 1001, 999, math.inf).largest_lowering == 3
    assert of(0.9, 1.1, 0.8, 1.2, 1001, 999, math.inf).smallest_diverging == 5
    assert of(1.0, 1000.0).largest_lowering == 0
    assert of(1.0, 1000.0).smallest_diverging is None
    model = deep().double()
    assert step_size.measure(Subject(model, batches(), squares), steps=(1e200,)).ratio.tolist() == [math.inf]


def test_dropout_and_the_like_draw_the_same_at_every_step() -> None:
    """But not in training, where every step has a draw of its own."""
    subject = Subject(chain(Noise()).double(), batches(1), ce)
    found = step_size.measure(subject, steps=(0.0, 1e-12))
    assert found.ratio[0] == 1
    assert found.ratio[1] == pytest.approx(1)
    curve = learning_rate.measure(subject, rates=(0.0,), steps=3).curves[0]
    assert len(set(curve.tolist())) == 3


def test_diverging_step() -> None:
    """Moments by hand at each share of the step; of a map that runs twice the mean of its calls."""
    model, subject = small()
    found = diverging_step.measure(subject, step=5.0, fractions=4, layers=["twice", "fc"])
    assert found.names == ("twice", "fc")
    assert found.step == 5.0
    for row, f in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        assert found.fractions[row] == f
        moved = stepped(model, subject.batches[0], 5.0 * f)
        _, second, third, out = (y.detach() for y in hand_forward(moved, subject.batches[0][0]))
        assert found.loss[row] == pytest.approx(ce(out, subject.batches[0][1]).item())
        twice = [(a + b) / 2 for a, b in zip(batch_moments(second), batch_moments(third), strict=True)]
        for place, (mean, var) in enumerate((twice, batch_moments(out))):
            torch.testing.assert_close(found.mean[place][row], mean, **ORACLE)
            torch.testing.assert_close(found.var[place][row], var, **ORACLE)
    assert found.growth == pytest.approx(float(found.var[1][4].mean() / found.var[1][0].mean()))


def first_to_diverge(model: nn.Module, batch: Batch) -> float:
    grid, loss = [10 ** (k / 4) for k in range(-20, 9)], squares(twin(model)(batch[0]), None).item()
    after = (squares(stepped(model, batch, a, squares)(batch[0]), None).item() for a in grid)
    return next((a for a, then in zip(grid, after, strict=True) if not then / loss <= 1e3), grid[-1])


def test_diverging_step_takes_the_first_of_the_grid_that_diverges() -> None:
    """Of all subjects together, the smallest; the grid's last where none diverges; some layers by default."""
    models, batch = {"deep": deep().double(), "chain": chain().double()}, batches(1)[0]
    subjects = {name: Subject(model, [batch], squares) for name, model in models.items()}
    wanted = {name: first_to_diverge(model, batch) for name, model in models.items()}
    assert wanted["deep"] < wanted["chain"]
    found = {name: diverging_step.measure(subject) for name, subject in subjects.items()}
    assert {name: along.step for name, along in found.items()} == pytest.approx(wanted)
    assert found["deep"].names == ("1", "3", "5")
    assert found["chain"].names == ("0", "3")
    together = diverging_step.measure_all(subjects)
    assert {name: along.step for name, along in together.items()} == dict.fromkeys(subjects, found["deep"].step)
    still = {"still": Subject(models["chain"], [batch], lambda z, _: z.tanh().mean() + 2)}
    assert diverging_step.measure_all(still)["still"].step == pytest.approx(100)


def trained(
    model: nn.Module, taken: tuple, rate: float, steps: int, test: list
) -> tuple[list[float], list[float], float]:
    """A plain loop: losses and accuracies by step, and the accuracy in evaluation."""
    other, losses, right = twin(model), [], []
    optimizer = torch.optim.SGD(other.parameters(), lr=rate, momentum=0.9)
    for step in range(steps):
        x, t = taken[step % len(taken)]
        z = other(x)
        loss = ce(z, t)
        losses.append(loss.item())
        right.append(100 * (z.argmax(1) == t).double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other.eval()
    return losses, right, 100 * np.mean([(other(x).argmax(1) == t).double().mean().item() for x, t in test])


def test_learning_rate() -> None:
    """Curves, final losses and accuracies of a training loop, at rates in ascending order."""
    model, _ = small()
    model.bn.momentum = 0.0  # evaluation is another thing than training
    model.bn.running_mean.normal_(0, 2)
    subject, test = Subject(model, batches(3, 6), ce), batches(2, 50)
    found = learning_rate.measure(subject, rates=(0.3, 0.01), steps=9, test=test)
    assert found.rates.tolist() == [0.01, 0.3]
    for row, rate in enumerate(found.rates.tolist()):
        losses, right, tested = trained(model, subject.batches, rate, 9, test)
        torch.testing.assert_close(found.curves[row], torch.tensor(losses, dtype=D), **REORDERED)
        assert found.loss[row] == pytest.approx(np.mean(losses[-2:]))
        assert found.accuracy[row] == pytest.approx(np.mean(right[-2:]))
        assert found.test[row] == pytest.approx(tested)
    assert not found.diverged.any()
    assert found.largest_stable == 0.3
    assert found.best == float(found.rates[found.loss.argmin()])


def test_a_rate_that_diverges() -> None:
    """Is nan from there on and bounds what is stable; a larger one that does not diverge is not stable either."""
    model, taken = deep().double(), batches(1)
    found = learning_rate.measure(Subject(model, taken, ce), rates=(1e-3, 1e-2, 1e4), steps=8)
    losses, *_ = trained(model, tuple(taken), 1e4, 8, taken)
    until = next(i for i, loss in enumerate(losses) if not loss <= 1e3)
    assert found.curves[2, :until].tolist() == pytest.approx(losses[:until])
    assert found.curves[2, until:].isnan().all()
    assert found.diverged.tolist() == [False, False, True]
    assert found.accuracy[2].isnan()
    assert found.test.isnan().all()
    assert found.largest_stable == 1e-2
    nan = torch.tensor([0.5, torch.nan, 0.2], dtype=D)
    one = learning_rate.LearningRates(torch.tensor([1.0, 2.0, 3.0]), nan[:, None], nan, nan, nan)
    assert (one.largest_stable, one.best) == (1, 3)
    none = learning_rate.LearningRates(one.rates, nan[:, None], nan * torch.nan, nan, nan)
    assert none.largest_stable == 0
    assert math.isnan(none.best)


def test_accuracy_is_nan_for_what_is_no_classification() -> None:
    found = learning_rate.measure(Subject(nn.Linear(3, 2), [torch.randn(4, 3)], squares), (0.1,))
    assert found.accuracy.isnan().all()
    assert found.loss[0] < found.curves[0, 0]


def test_gaussian_products() -> None:
    """Singular values by numpy, of numpy's products of the same matrices; geometric means over the draws."""
    found = gaussian_products.measure(width=7, factors=(3, 1), draws=3)
    logs = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        a, b, c = (torch.randn(7, 7, dtype=D, generator=draw).numpy() / np.sqrt(7) for _ in range(3))
        logs.append([np.log(np.linalg.svd(p, compute_uv=False)) for p in (a @ b @ c, a)])
    logs = np.array(logs)
    assert found.factors == (3, 1)
    np.testing.assert_allclose(found.singular.numpy(), np.exp(logs.mean(0)), **ORACLE)
    np.testing.assert_allclose(found.condition.numpy(), np.exp((logs[..., 0] - logs[..., -1]).mean(0)), **ORACLE)
