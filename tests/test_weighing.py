"""Example weighing at inference, against its equation, and the choice of alpha."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab

from .small_models import ResNet, shake
from .tolerances import ORACLE, REORDERED, SAME


def weighed(x: Tensor, bn: nn.Module, alpha: float) -> Tensor:
    """The paper's equation, in the moments of x and x^2."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    m_x = bn.running_mean.view(shape)
    m_x2 = (bn.running_var + bn.running_mean**2).view(shape)
    where = tuple(range(2, x.dim()))
    mean, second = (x.mean(where, True), (x * x).mean(where, True)) if where else (x, x * x)
    mu = (1 - alpha) * m_x + alpha * mean
    var = (1 - alpha) * m_x2 + alpha * second - mu * mu
    return bn.weight.view(shape) * (x - mu) / torch.sqrt(var + bn.eps) + bn.bias.view(shape)


@given(shape=st.sampled_from([(3, 5), (2, 5, 7), (1, 5, 3, 2), (3, 5, 1, 1), (2, 5, 2, 3, 2)]), alpha=st.floats(0, 1))
def test_is_the_equation(shape: tuple[int, ...], alpha: float) -> None:
    """Outputs, and the gradients of input, gamma and beta, in float64."""
    bn = shake(ab.nn.ExampleWeighedBatchNorm(5, alpha=alpha, dtype=torch.float64).eval())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    results = []
    for out in (bn(x), weighed(x, bn, alpha)):
        results.append([out, *torch.autograd.grad(out, [x, bn.weight, bn.bias], g)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **ORACLE)


def test_alpha_zero_is_batchnorm_and_one_is_instance_norm() -> None:
    x = torch.randn(3, 5, 4, 6) * 3 + 2
    bn = shake(nn.BatchNorm2d(5)).eval()
    model = nn.Sequential(bn)
    expected = model(x)
    ab.weigh_examples_(model, 0.0)
    assert torch.equal(model(x), expected)
    ab.weigh_examples_(model, 1.0)
    torch.testing.assert_close(model(x), F.instance_norm(x, weight=bn.weight, bias=bn.bias), **REORDERED)
    ab.weigh_examples_(model, 0.0)
    assert torch.equal(model(x), expected)


def test_training_is_batchnorms_and_the_state_is_the_same() -> None:
    torch.manual_seed(1)
    plain = shake(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    model = copy.deepcopy(plain)
    ab.weigh_examples_(model, 0.3)
    for n in (4, 3, 1):
        x = torch.randn(n, 3, 6, 6)
        g = torch.randn(n, 5, 4, 4)
        for net in (plain, model):
            net.zero_grad()
            net(x).backward(g)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize("name", ab.METHODS)
def test_every_method_is_weighed_or_says_why_not(name: str) -> None:
    """Weighed models evaluate otherwise, each example by itself, and back at alpha 0 as before; they do not fold."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    ab.convert_(model, ab.METHODS[name].small, example_inputs=torch.randn(2, 3, 6, 6))
    model(torch.randn(4, 3, 6, 6) + 1)
    model.eval()
    x = torch.randn(3, 3, 6, 6)
    before = model(x)
    if not isinstance(model[1], nn.modules.batchnorm._BatchNorm) or not getattr(model[1], "can_weigh", True):
        with pytest.raises(ab.AnybatchError, match="keeps running moments"):
            ab.weigh_examples_(model, 0.5)
        return
    report = ab.weigh_examples_(model, 0.5)
    assert [row.action for row in report.rows] == ["weighed"]
    assert "1 weighed" in str(report)
    out = model(x)
    assert (out - before).abs().max() > 1e-3
    torch.testing.assert_close(model(x[1:2]), out[1:2], **REORDERED)
    with pytest.raises(ab.AnybatchError, match="cannot be folded"):
        ab.fold(model, example_inputs=x)
    ab.weigh_examples_(model, 0.0)
    if name != "weighed":
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "0.5", None, True])
def test_alpha_out_of_range_is_refused(alpha: object) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    for call in (
        lambda: ab.weigh_examples_(model, alpha),
        lambda: ab.ExampleWeighedBN(alpha=alpha),
        lambda: ab.tune_example_weight(model, [torch.randn(1, 3, 2, 2)], candidates=[alpha]),
        lambda: ab.nn.ExampleWeighedBatchNorm(3, alpha=alpha),
    ):
        with pytest.raises(ab.AnybatchError, match=r"alpha=.*from 0 to 1"):
            call()
    assert type(model[0]) is nn.BatchNorm2d


def test_models_that_cannot_be_weighed_say_why() -> None:
    with pytest.raises(ab.AnybatchError, match="no running statistics"):
        ab.weigh_examples_(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), 0.5)
    with pytest.raises(ab.AnybatchError, match="no BatchNorm"):
        ab.weigh_examples_(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(ab.AnybatchError, match="wrap it"):
        ab.weigh_examples_(nn.BatchNorm2d(3), 0.5)


def classified() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model, and batches labelled at random, unequal in size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
    model = nn.Sequential(shake(model), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    return model, [(torch.randn(n, 3, 16, 16) * 2, torch.randint(2, (n,))) for n in (5, 60, 1)]


def outputs(model: nn.Module, alpha: float, x: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    ab.weigh_examples_(other, alpha)
    with torch.no_grad():
        return other.eval()(x)


def test_tuning_finds_alpha_in_one_pass_and_leaves_the_model() -> None:
    """Against the outputs at one alpha as the truth, that alpha is found; an iterator is read once."""
    model, loader = classified()
    modules, training = list(model.modules()), [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    truth = iter([(x, outputs(model, 0.7, x)) for x, _ in loader])
    found = ab.tune_example_weight(model, truth, score=lambda m, batch: -(m(batch[0]) - batch[1]).square().mean())
    assert found.alpha == 0.7
    assert found.scores[0.7] == 0.0
    assert found.examples == 66
    assert list(found.scores) == [round(0.1 * i, 1) for i in range(11)]
    assert list(model.modules()) == modules
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_tuning_scores_by_accuracy() -> None:
    model, loader = classified()
    found = ab.tune_example_weight(model, loader, candidates=(1.0, 0.0, 0.4))
    assert list(found.scores) == [0.0, 0.4, 1.0]
    x, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    for alpha, score in found.scores.items():
        assert score == pytest.approx(float((outputs(model, alpha, x).argmax(1) == labels).double().mean()))
    assert found.scores[found.alpha] == max(found.scores.values())


def test_tuning_restores_the_model_on_an_error() -> None:
    model, loader = classified()
    ab.convert_(model, ab.CBN(), example_inputs=loader[0][0])
    ab.weigh_examples_(model, 0.4)
    modules = list(model.modules())
    with pytest.raises(ab.AnybatchError, match="no scores of classes"):
        ab.tune_example_weight(model, [loader[0], (loader[1][0], loader[1][1][:3])])
    assert list(model.modules()) == modules
    assert {m.alpha for m in modules if hasattr(m, "alpha")} == {0.4}
    assert model.training


@pytest.mark.parametrize(
    ("loader", "candidates", "said"),
    [
        ([], [0.5], "no example"),
        ([(torch.randn(2, 3, 16, 16),)], [0.5], r"a batch is a tuple, not \(inputs, labels\)"),
        ([(torch.randn(2, 3, 16, 16), [{"boxes": 1}])], [0.5], r"not \(inputs, labels\), both tensors"),
        ([], [], "no candidates"),
        (torch.randn(2, 3, 16, 16), [0.5], "a Tensor"),
    ],
)
def test_bad_loaders_are_refused(loader: object, candidates: list[float], said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        ab.tune_example_weight(ResNet(), loader, candidates)


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ab.AnybatchError, match=r"alpha=0.5 is nan"):
        ab.tune_example_weight(ResNet(), [torch.randn(2, 3, 16, 16)], [0.5], lambda model, batch: float("nan"))


def test_recalibration_does_not_depend_on_the_weight() -> None:
    """Each norm's batch moments, whatever alpha, which stays."""
    model, loader = classified()
    other = copy.deepcopy(model)
    ab.weigh_examples_(other, 1.0)
    for net in (model, other):
        ab.recalibrate_(net, loader)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, **SAME)
    assert other[0][1].alpha == 1.0
