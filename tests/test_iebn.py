"""Instance Enhancement BatchNorm against its equations, alone and over CBN."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import (
    CrossIterationBatchNorm,
    InstanceEnhancementBatchNorm,
    InstanceEnhancementCrossIterationBatchNorm,
)

from . import oracle
from .tolerances import HALF, ORACLE, REORDERED

D = torch.float64
SHAPES = [(5, 4), (7, 4, 5), (3, 4, 1, 1), (5, 4, 3, 2), (1, 4, 3, 3), (4, 4, 2, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    return norm


def batch(shape: tuple[int, ...]) -> Tensor:
    return (torch.randn(shape, dtype=D) * 1.5 + 0.7).requires_grad_()


def gated(norm: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """y_hat * (gamma * sigmoid(g_hat * E[x] + b_hat)) + beta, by definition; moments (C,) or (N, C)."""
    ones = [1] * (x.dim() - 2)
    x_mean = x.flatten(2).mean(2) if x.dim() > 2 else x
    s = torch.sigmoid(norm.gate_weight * x_mean + norm.gate_bias)
    gamma = torch.ones_like(norm.gate_bias) if norm.weight is None else norm.weight
    beta = torch.zeros_like(gamma) if norm.bias is None else norm.bias
    mean, var = (t.view(-1, 4, *ones) for t in (mean, var))
    return (x - mean) / (var + norm.eps).sqrt() * (gamma * s).view(*s.shape, *ones) + beta.view(-1, *ones)


def same(mine: Tensor, theirs: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(mine, theirs, **ORACLE)
    cotangent = torch.randn_like(mine)
    grads = [torch.autograd.grad(out, wanted, cotangent) for out in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


@every_shape
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_outputs_and_every_gradient(shape: tuple[int, ...], options: dict) -> None:
    norm = random(InstanceEnhancementBatchNorm(4, dtype=D, **options))
    x = batch(shape)
    same(norm(x), gated(norm, x, *oracle.batch_moments(x)), [x, *norm.parameters()])


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 3, 2), (6, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_group_of_examples_is_a_batch_of_its_own(shape: tuple[int, ...], size: int, momentum: float | None) -> None:
    """Outputs, gradients and running statistics."""
    grouped = random(InstanceEnhancementBatchNorm(4, momentum=momentum, examples_per_group=size, dtype=D))
    alone = InstanceEnhancementBatchNorm(4, momentum=momentum, dtype=D)
    alone.load_state_dict(grouped.state_dict())
    x = batch(shape)
    same(grouped(x), torch.cat([alone(part) for part in x.split(size)]), [x])
    for name, value in alone.named_buffers():
        torch.testing.assert_close(grouped.get_buffer(name), value, **ORACLE)


def test_groups_of_a_single_value_leave_the_running_statistics() -> None:
    norm = random(InstanceEnhancementBatchNorm(4, examples_per_group=1, dtype=D))
    x = batch((3, 4))
    same(norm(x), gated(norm, x, x, torch.zeros(3, 4, dtype=D)), [x])
    assert (norm.running_mean.abs().sum(), norm.num_batches_tracked) == (0, 0)


@pytest.mark.parametrize("build", [ab.IEBN, lambda **options: InstanceEnhancementBatchNorm(4, **options)])
def test_groups_are_refused_over_ranks_and_out_of_range(build: Callable[..., object]) -> None:
    with pytest.raises(ab.AnybatchError, match="sync=True with examples_per_group"):
        build(sync=True, examples_per_group=2)
    with pytest.raises(ab.AnybatchError, match="IEBN: examples_per_group=0"):
        build(examples_per_group=0)


@every_shape
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_evaluation_has_the_same_gate(shape: tuple[int, ...], alpha: float) -> None:
    """Over the running statistics, with the example's own weighed in."""
    norm = random(InstanceEnhancementBatchNorm(4, dtype=D, alpha=alpha))
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    x = batch(shape)
    own = x.reshape(*shape[:2], -1)
    mean = (1 - alpha) * norm.running_mean + alpha * own.mean(2)
    second = (1 - alpha) * (norm.running_var + norm.running_mean**2) + alpha * own.square().mean(2)
    same(norm.eval()(x), gated(norm, x, mean, second - mean**2), [x, *norm.parameters()])
    assert not norm.foldable


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_without_alpha_an_examples_variance_does_not_matter(dtype: torch.dtype, autocast: bool) -> None:
    """The same as with a share of it that vanishes, in any precision; and it may overflow."""
    norm = random(InstanceEnhancementBatchNorm(4)).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    norm.gate_weight.data.div_(10)
    norm = norm if autocast else norm.to(dtype)
    x = batch((3, 4, 5, 2)).detach().to(dtype).requires_grad_()
    outs, cotangent = [], torch.randn(x.shape).to(dtype)
    for norm.alpha in (0.0, 1e-12):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = norm(x)
        assert out.dtype == dtype
        outs.append([out, *torch.autograd.grad(out, [x, *norm.parameters()], cotangent)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, **HALF.get(dtype, REORDERED))
    if dtype != torch.float16:
        norm.alpha = 0.0
        assert norm(torch.full((2, 4, 2, 1), 1e20, dtype=dtype)).isfinite().all()


def test_without_running_statistics_evaluation_takes_the_batchs() -> None:
    norm = random(InstanceEnhancementBatchNorm(4, dtype=D, track_running_stats=False)).eval()
    x = batch((3, 4, 5))
    same(norm(x), gated(norm, x, *oracle.batch_moments(x)), [x, *norm.parameters()])


@every_shape
def test_at_first_it_is_batchnorm_behind_a_constant_gate(shape: tuple[int, ...]) -> None:
    """gamma * sigmoid(-1) instead of gamma; the same running statistics."""
    bn = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4, dtype=D)
    random(bn)
    norm = ab.IEBN().build(bn.__class__(4, dtype=D))
    norm.load_state_dict(bn.state_dict(), strict=False)
    bn.weight.data *= torch.tensor(-1.0, dtype=D).sigmoid()
    for training in (True, True, False):
        x = batch(shape)
        torch.testing.assert_close(norm.train(training)(x), bn.train(training)(x), **ORACLE)
        for a, b in zip(norm.buffers(), bn.buffers(), strict=True):
            torch.testing.assert_close(a, b, **ORACLE)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_over_cbn(options: dict) -> None:
    """The gate over CBN's y_hat: outputs and every gradient, the map's through the history included."""
    conv = nn.Conv2d(3, 4, 3, dtype=D)
    norm = random(
        InstanceEnhancementCrossIterationBatchNorm(4, 3, kind="ring", average_reductions=0, dtype=D, **options)
    )
    norm.follows(conv)
    past = []
    for n in (2, 4, 3):
        x = torch.randn(n, 3, 5, 6, dtype=D)
        norm(conv(x))
        past.append(oracle.Past(conv, conv.weight.detach().clone(), conv.bias.detach().clone(), x))
        with torch.no_grad():
            conv.weight += 0.02 * torch.randn_like(conv.weight)
    x = torch.randn(2, 3, 5, 6, dtype=D, requires_grad=True)
    y = oracle.run(conv, conv.weight, conv.bias, x)
    mean, var = oracle.pooled_moments(
        y, past[-2:], conv.weight, conv.bias, equal=False, second_moment=False, detach=False
    )
    same(norm(conv(x)), gated(norm, y, mean, var), [x, *conv.parameters(), *norm.parameters()])


@pytest.mark.parametrize("training", [True, False])
def test_at_first_it_is_cbn_behind_a_constant_gate(training: bool) -> None:
    norm, cbn = (
        layer(4, window=3, dtype=D) for layer in (InstanceEnhancementCrossIterationBatchNorm, CrossIterationBatchNorm)
    )
    for n in (2, 3, 1):
        x = batch((n, 4, 3, 2))
        gate = torch.tensor(-1.0, dtype=D).sigmoid()
        torch.testing.assert_close(norm.train()(x), gate * cbn.train()(x), **ORACLE)
    x = batch((2, 4, 3, 2))
    torch.testing.assert_close(norm.train(training)(x), gate * cbn.train(training)(x), **ORACLE)


@pytest.mark.parametrize("window", [1, 3])
def test_the_gate_is_made_like_the_norm(window: int) -> None:
    for bn in (nn.BatchNorm2d(4, dtype=D), nn.BatchNorm2d(4, affine=False, dtype=D)):
        norm = ab.IEBN(window=window).build(bn)
        assert norm.gate_weight.dtype == norm.gate_bias.dtype == D
        assert norm.gate_weight.tolist() == [0] * 4
        assert norm.gate_bias.tolist() == [-1] * 4
        assert norm.decays_to["gate_weight"] is norm.decays_to["gate_bias"] is None
    assert list(norm.state_dict())[:2] == ["gate_weight", "gate_bias"]


def test_the_gate_survives_another_window_and_no_other_method() -> None:
    norm = random(InstanceEnhancementBatchNorm(4))
    over_cbn = ab.IEBN(window=2).build(norm)
    assert over_cbn.gate_weight is norm.gate_weight
    assert over_cbn.gate_bias is norm.gate_bias
    assert set(ab.CBN().build(norm).state_dict()) == set(nn.BatchNorm2d(4).state_dict())
    assert set(norm.to_batchnorm().state_dict()) == set(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("window", [1, 3])
def test_empty_batches_give_every_parameter_a_gradient(window: int) -> None:
    norm = ab.IEBN(window=window).build(nn.BatchNorm2d(4))
    for training in (True, False):
        norm.train(training)(torch.randn(0, 4, 2, 2)).sum().backward()
        assert all((p.grad == 0).all() for p in norm.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"shortcuts": "left"}, "'plain', 'converted'"), ({"window": 0}, "window=0; give a whole number of at least 1")],
)
def test_options_out_of_range(options: dict, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        ab.IEBN(**options)


class Block(nn.Module):
    """A residual block with a projection in its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


def test_the_converter_leaves_the_norm_of_a_shortcut_plain() -> None:
    x = torch.randn(2, 3, 5, 5)
    model = Block()
    report = ab.convert_(model, ab.IEBN(), example_inputs=x)
    assert {row.name for row in report.converted} == {"bn1", "bn2"}
    assert [row.reason for row in report.left] == ["the norm of a shortcut: BN, without a gate"]
    assert type(model.shortcut[1]) is nn.BatchNorm2d
    assert len(ab.convert_(Block(), ab.IEBN("converted"), example_inputs=x).converted) == 3


def test_over_cbn_the_norm_of_a_shortcut_is_cbn() -> None:
    """Plain BatchNorm there would bring the small batch back in."""
    x = torch.randn(2, 3, 5, 5)
    model = Block()
    report = ab.convert_(model, ab.IEBN(window=3), example_inputs=x)
    assert report.rows[2].reason == "the norm of a shortcut: CBN, without a gate"
    assert type(model.shortcut[1]) is CrossIterationBatchNorm
    assert model.shortcut[1].window == 3
    assert model.shortcut[1].maps == (model.shortcut[0],)
    model = Block()
    ab.convert_(model, ab.IEBN("converted", 3), example_inputs=x)
    assert type(model.shortcut[1]) is InstanceEnhancementCrossIterationBatchNorm


def test_shortcuts_can_only_be_seen_on_an_example() -> None:
    with pytest.raises(ab.AnybatchError, match="example_inputs"):
        ab.convert_(Block(), ab.IEBN())
    assert len(ab.convert_(Block(), ab.IEBN("converted")).converted) == 3


def test_a_gated_norm_cannot_be_folded() -> None:
    model = Block()
    ab.convert_(model, ab.IEBN("converted"))
    with pytest.raises(ab.AnybatchError, match="more than a scale and a shift"):
        ab.fold(model.eval(), example_inputs=torch.randn(1, 3, 5, 5))


def test_shortcuts_become_plain_again() -> None:
    """Whatever they were before."""
    x = torch.randn(2, 3, 5, 5)
    for before in (ab.CBN(), ab.IEBN("converted")):
        model = Block()
        ab.convert_(model, before, example_inputs=x)
        report = ab.convert_(model, ab.IEBN(), example_inputs=x)
        assert len(report.converted) == 3
        assert type(model.shortcut[1]) is nn.BatchNorm2d
