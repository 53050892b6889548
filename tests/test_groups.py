"""Ghost BN, and batch and group normalization together, against their equations, and the laws that hold them."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import anybatch as ab
from anybatch.nn import BatchAndGroupNorm, BatchGroupNormalization, GhostBatchNorm

from .norm_checks import (
    D,
    batch,
    cells,
    every_shape,
    ghosts,
    random_affine,
    same_as,
    same_buffers,
    same_gradients,
    torch_norm,
)
from .tolerances import HALF, ORACLE, SAME

# --- Ghost BN


@every_shape
@pytest.mark.parametrize("per_group", [1, 2, 3, 9])
def test_ghost(shape: tuple[int, ...], per_group: int) -> None:
    norm = random_affine(GhostBatchNorm(4, per_group, dtype=D))
    x = batch(shape)
    expected = cells(x, ghosts(shape[0], per_group), 4, norm.weight, norm.bias, norm.eps)
    wanted = [x, *norm.parameters()]
    same_gradients(norm(x), expected, [wanted, wanted])


@given(st.integers(1, 13), st.integers(1, 14))
def test_ghosts_are_as_equal_as_can_be(examples: int, per_group: int) -> None:
    sizes = ghosts(examples, per_group)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= per_group
    norm = GhostBatchNorm(2, per_group, affine=False, dtype=D)
    x = batch((examples, 2, 3))
    one = torch.ones(2, dtype=D)
    torch.testing.assert_close(norm(x), cells(x, sizes, 2, one, 0 * one, norm.eps), **ORACLE)


@every_shape
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_ghost_is_batchnorm(shape: tuple[int, ...], momentum: float | None) -> None:
    """Outputs, every gradient and running statistics, over two steps."""
    norm = random_affine(GhostBatchNorm(4, 8, momentum=momentum, dtype=D))
    bn = torch_norm(norm, torch.empty(shape))
    bn.momentum = momentum
    for _ in range(2):
        same_as(norm, bn, batch(shape))
        same_buffers(norm, bn)


@pytest.mark.parametrize("per_group", [2, 3])
def test_running_statistics_of_ghosts_are_the_whole_batchs(per_group: int) -> None:
    norm, bn = GhostBatchNorm(4, per_group, dtype=D), nn.BatchNorm2d(4, dtype=D)
    for n in (7, 4):
        x = torch.randn(n, 4, 3, 2, dtype=D) + torch.arange(n, dtype=D).view(-1, 1, 1, 1)
        norm(x), bn(x)
        same_buffers(norm, bn)
    x = batch((2, 4, 3, 3))
    torch.testing.assert_close(norm.eval()(x), bn.eval()(x), **ORACLE)


@every_shape
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("per_group", [1, 2, 3, 9])
def test_running_statistics_of_one_ghost_after_another(
    shape: tuple[int, ...], per_group: int, momentum: float | None
) -> None:
    """As of BatchNorm on each; it refuses a single value a channel, of which there is nothing to take."""
    norm = GhostBatchNorm(4, per_group, momentum=momentum, dtype=D, running="ghosts")
    bn = torch_norm(norm, torch.empty(shape))
    bn.momentum = momentum
    for _ in range(2):
        x = batch(shape)
        norm(x)
        for ghost in x.split(ghosts(shape[0], per_group)):
            if ghost[:, 0].numel() > 1:
                bn(ghost)
        same_buffers(norm, bn)


def test_a_ghost_of_one_value_gives_beta_and_no_gradient() -> None:
    norm = random_affine(GhostBatchNorm(3, 1, dtype=D))
    x = batch((4, 3))
    out = norm(x)
    torch.testing.assert_close(out, norm.bias.expand(4, 3), **ORACLE)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    torch.testing.assert_close(grad, torch.zeros_like(grad), **ORACLE)


# --- Batch and group normalization


@every_shape
@pytest.mark.parametrize("per_group", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_group(shape: tuple[int, ...], groups: int, per_group: int) -> None:
    norm = random_affine(BatchAndGroupNorm(4, groups, per_group, dtype=D))
    x = batch(shape)
    expected = cells(x, ghosts(shape[0], per_group), groups, norm.weight, norm.bias, norm.eps)
    wanted = [x, *norm.parameters()]
    same_gradients(norm(x), expected, [wanted, wanted])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (1, 4, 1, 1), (3, 4, 3, 2)], ids=str)
def test_one_example_a_group_is_groupnorm(shape: tuple[int, ...]) -> None:
    """In training; and in evaluation with alpha 1."""
    norm, gn = random_affine(BatchAndGroupNorm(4, 2, 1, dtype=D, alpha=1.0)), nn.GroupNorm(2, 4, dtype=D)
    gn.weight, gn.bias = norm.weight, norm.bias
    same_as(norm, gn, batch(shape))
    same_as(norm.eval(), gn, batch(shape))


@every_shape
def test_a_group_a_channel_is_ghost_and_batchnorm(shape: tuple[int, ...]) -> None:
    for per_group in (2, 9):
        norm = random_affine(BatchAndGroupNorm(4, 4, per_group, dtype=D))
        ghost = GhostBatchNorm(4, per_group, dtype=D)
        ghost.load_state_dict(norm.state_dict())
        same_as(norm, ghost, batch(shape))
    same_as(norm, torch_norm(norm, torch.empty(shape)), batch(shape))


def test_running_statistics_average_first_and_second_moments() -> None:
    norm = BatchAndGroupNorm(4, 2, 2, momentum=0.3, dtype=D)
    first, second = torch.zeros(4, dtype=D), torch.ones(4, dtype=D)
    for n in (3, 5, 2):
        x = torch.randn(n, 4, 3, 2, dtype=D) + n
        norm(x)
        first = 0.7 * first + 0.3 * x.mean((0, 2, 3))
        second = 0.7 * second + 0.3 * x.square().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, first, **ORACLE)
    torch.testing.assert_close(norm.running_var, second - first.square(), **ORACLE)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_batch_group_evaluation(alpha: float) -> None:
    """As the authors' code: moments m_x, m_x2 averaged over the group, with the example's own weighed in."""
    norm = random_affine(BatchAndGroupNorm(6, 2, 2, dtype=D, alpha=alpha))
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    norm.eval()
    x = batch((3, 6, 4, 5))
    m_x, m_x2 = norm.running_mean, norm.running_var + norm.running_mean.square()
    out = []
    for example in x:
        own = example.view(2, 3, -1)
        mean = (1 - alpha) * m_x.view(2, 3).mean(1) + alpha * own.mean((1, 2))
        var = (1 - alpha) * m_x2.view(2, 3).mean(1) + alpha * own.square().mean((1, 2)) - mean.square()
        y_hat = (own - mean.view(2, 1, 1)) / (var + norm.eps).sqrt().view(2, 1, 1)
        out.append(y_hat.view_as(example) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
    wanted = [x, *norm.parameters()]
    same_gradients(norm(x), torch.stack(out), [wanted, wanted])
    assert norm.foldable == (alpha == 0)
    if not alpha:
        torch.testing.assert_close(norm.to_batchnorm()(x), norm(x), rtol=0, atol=0)


def test_without_running_statistics_evaluation_groups_the_batchs_own() -> None:
    norm = random_affine(BatchAndGroupNorm(4, 2, track_running_stats=False, dtype=D)).eval()
    x = batch((3, 4, 2, 5))
    torch.testing.assert_close(norm(x), cells(x, [3], 2, norm.weight, norm.bias, norm.eps), **ORACLE)


@pytest.mark.parametrize("make", [lambda: BatchAndGroupNorm(4, 4), lambda: BatchGroupNormalization(4, 4)])
def test_one_value_a_group_is_normalised_by_the_running_statistics(make) -> None:
    norm = make()
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), (x - 2) / (1 + norm.eps) ** 0.5, **SAME)
    assert norm.num_batches_tracked == 0


def test_a_group_of_one_value_gives_beta_and_no_gradient() -> None:
    """Where the batch has more than one such group."""
    norm = random_affine(BatchAndGroupNorm(4, 4, 1, dtype=D))
    x = batch((3, 4))
    out = norm(x)
    torch.testing.assert_close(out, norm.bias.expand(3, 4), **ORACLE)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    torch.testing.assert_close(grad, torch.zeros_like(grad), **ORACLE)


# --- these and BGN


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("config", [ab.BatchGroupNorm(1), ab.BGN(1)], ids=str)
def test_running_moments_in_half_precision_are_pooled_in_full(config, dtype: torch.dtype) -> None:
    """Rounded once; the square of one channel's distance from the others is more than float16 holds."""
    bn = nn.BatchNorm2d(32)
    bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    bn.running_mean[3] = 500.0
    bn = bn.to(dtype)
    mean, var = bn.running_mean.double(), bn.running_var.double()
    found = config.build(bn).channel_moments()
    for a, exact in zip(found, (mean.mean(), var.mean() + mean.var(correction=0)), strict=True):
        assert torch.equal(a, exact.to(dtype).expand(32))


@pytest.mark.parametrize("config", [ab.GhostBN(2), ab.BatchGroupNorm(2), ab.BGN(2), ab.BGN(), ab.BGN(8)], ids=str)
def test_recalibration_takes_what_the_layer_averages(config) -> None:
    """The layer's running statistics become the moments of all batches together, in its own grouping."""
    norm = config.build(nn.BatchNorm2d(4).double())
    data = [torch.randn(n, 4, 3, 2, dtype=D) * n for n in (3, 2, 4)]
    ab.recalibrate_(nn.Sequential(norm), data)
    groups = getattr(norm, "groups", None) or 4
    x = torch.cat(data).reshape(9, groups, -1)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2)), **ORACLE)
    torch.testing.assert_close(norm.running_var, x.var((0, 2), correction=0), **ORACLE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: ab.GhostBN(0), "examples_per_group=0; give a whole number"),
        (lambda: ab.GhostBN(2, "ghost"), "running='ghost'"),
        (lambda: ab.BatchGroupNorm(channel_groups=2.0), "channel_groups=2.0"),
        (lambda: ab.BatchGroupNorm(alpha=2), "alpha=2; give a number from 0 to 1"),
        (lambda: ab.BGN(0), "groups=0; give a whole number of at least 1, or None"),
        (lambda: BatchAndGroupNorm(12, 5), "channel_groups=5 does not divide 12 channels; choose one of 1, 2, 3, 4, 6"),
        (lambda: BatchGroupNormalization(12, 5), "groups=5 does not divide 12 channels; choose one of 1, 2, 3, 4, 6"),
        (
            lambda: BatchGroupNormalization(12, 30),
            "groups=30 does not divide 12 channels; choose one of 1, 2, 3, 4, 6, 12, or a multiple of 12",
        ),
    ],
)
def test_options_out_of_range(config, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        config()


def test_the_converter_names_the_norm_that_does_not_divide() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12))
    with pytest.raises(ab.AnybatchError, match=r"'1': BatchGroupNorm: channel_groups=32 does not divide 12"):
        ab.convert_(model, ab.BatchGroupNorm())


@pytest.mark.parametrize("layer", [GhostBatchNorm, BatchAndGroupNorm, BatchGroupNormalization])
def test_empty_batches_pass(layer) -> None:
    norm = layer(3, 3)
    for training in (True, False):
        x = torch.randn(0, 3, 2, 2, requires_grad=True)
        out = norm.train(training)(x)
        out.sum().backward()
        assert out.shape == x.shape
        assert all((p.grad == 0).all() for p in norm.parameters())
    assert norm.num_batches_tracked == 0


@hypothesis.settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.sampled_from([1, 2, 3, 6]), st.integers(1, 4), st.integers(1, 7))
def test_groups_of_any_size(examples: int, groups: int, positions: int, per_group: int) -> None:
    hypothesis.assume(positions * 6 // groups * min(examples, per_group) > 1)
    x = batch((examples, 6, positions))
    gamma, beta = torch.ones(6, dtype=D), torch.zeros(6, dtype=D)
    norm = BatchAndGroupNorm(6, groups, per_group, dtype=D)
    expected = cells(x, ghosts(examples, per_group), groups, gamma, beta, norm.eps)
    torch.testing.assert_close(norm(x), expected, **ORACLE)
