"""Ghost BN, batch and group normalization together, and BGN against their equations, and the laws that hold them."""

import copy

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import BatchAndGroupNorm, BatchGroupNormalization, GhostBatchNorm

from .tolerances import ORACLE, SAME

D = torch.float64
SHAPES = [(5, 4), (7, 4, 5), (3, 4, 1, 1), (5, 4, 3, 2), (1, 4, 3, 3), (4, 4, 2, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_affine(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    return norm


def batch(shape: tuple[int, ...], mean: float = 0.7) -> Tensor:
    return (torch.randn(shape, dtype=D) * 1.5 + mean).requires_grad_()


def cells(y: Tensor, example_cuts: list[int], groups: int, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Every cell of (group of examples, group of channels) by its own moments, by definition."""
    rows = []
    for examples in y.split(example_cuts):
        columns = []
        for cell in examples.chunk(groups, 1):
            mean = cell.mean()
            columns.append((cell - mean) / ((cell - mean).square().mean() + eps).sqrt())
        rows.append(torch.cat(columns, 1))
    shape = (1, -1, *[1] * (y.dim() - 2))
    return torch.cat(rows) * gamma.view(shape) + beta.view(shape)


def ghosts(examples: int, per_group: int) -> list[int]:
    """Sizes of ceil(N / per_group) groups, as equal as can be, the larger first."""
    count = -(-examples // per_group)
    return [len(part) for part in torch.arange(examples).tensor_split(count)]


def same_gradients(mine: Tensor, theirs: Tensor, wanted: list[list[Tensor]], tolerance: dict = ORACLE) -> None:
    """Outputs, and gradients under one random cotangent, each side by its own tensors."""
    torch.testing.assert_close(mine, theirs, **tolerance)
    cotangent = torch.randn_like(mine)
    grads = [torch.autograd.grad(out, of, cotangent) for out, of in zip((mine, theirs), wanted, strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def same_as(norm: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Outputs and every gradient, for layers with the same parameters."""
    z = x.detach().clone().requires_grad_()
    same_gradients(norm(x), other(z), [[x, *norm.parameters()], [z, *other.parameters()]])


def torch_norm(norm: nn.Module, x: Tensor) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    bn = kind(norm.num_features, dtype=D)
    bn.load_state_dict(norm.state_dict())
    return bn


def same_buffers(norm: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(norm.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, **ORACLE, msg=name)


# --- Ghost BN


@every_shape
@pytest.mark.parametrize("per_group", [1, 2, 3, 9])
def test_ghost(shape: tuple[int, ...], per_group: int) -> None:
    if shape[0] == 1 == torch.Size(shape[2:]).numel():
        pytest.skip("one value a channel")
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
    if groups == 4 and shape == (1, 4, 1, 1):
        pytest.skip("one value a group")
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


# --- BGN


def by_definition(y: Tensor, groups: int, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the G means and variances of x read as (N, G, D)."""
    x = y.reshape(len(y), groups, -1)
    mean = x.mean((0, 2))
    var = (x - mean.view(-1, 1)).square().mean((0, 2))
    y_hat = ((x - mean.view(-1, 1)) / (var + eps).sqrt().view(-1, 1)).reshape(y.shape)
    shape = (1, -1, *[1] * (y.dim() - 2))
    return gamma.view(shape) * y_hat + beta.view(shape), mean, var


@every_shape
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 12])
def test_bgn(shape: tuple[int, ...], groups: int) -> None:
    """Outputs, every gradient, running statistics with the group's Bessel correction, and evaluation."""
    positions = torch.Size(shape[2:]).numel()
    if (groups > 4 and positions % (groups // 4)) or shape[0] * 4 * positions == groups:
        pytest.skip("no such groups")
    norm = random_affine(BatchGroupNormalization(4, groups, dtype=D))
    x = batch(shape)
    expected, mean, var = by_definition(x, groups, norm.weight, norm.bias, norm.eps)
    wanted = [x, *norm.parameters()]
    same_gradients(norm(x), expected, [wanted, wanted])
    m = x.numel() // groups
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, **ORACLE)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var * m / (m - 1), **ORACLE)

    norm.eval()
    z = x.reshape(len(x), groups, -1)
    y_hat = (z - norm.running_mean.view(-1, 1)) / (norm.running_var + norm.eps).sqrt().view(-1, 1)
    by = (1, -1, *[1] * (x.dim() - 2))
    expected = norm.weight.view(by) * y_hat.reshape(shape) + norm.bias.view(by)
    same_gradients(norm(x), expected, [wanted, wanted])
    assert norm.foldable == norm.can_weigh == (groups <= 4)


@every_shape
def test_as_many_groups_as_channels_is_batchnorm(shape: tuple[int, ...]) -> None:
    norm = random_affine(BatchGroupNormalization(4, 4, dtype=D))
    bn = torch_norm(norm, torch.empty(shape))
    for _ in range(2):
        same_as(norm, bn, batch(shape))
        same_buffers(norm, bn)
    same_as(norm.eval(), bn.eval(), batch(shape))


@pytest.mark.parametrize(
    ("channels", "examples", "groups"),
    [(64, 2, 4), (64, 32, 64), (64, 500, 64), (12, 8, 3), (12, 16, 6), (8, 1, 1), (7, 16, 1)],
)
def test_the_first_batch_settles_the_groups(channels: int, examples: int, groups: int) -> None:
    """The largest divisor of C up to C * N / 32; then it stays."""
    norm = BatchGroupNormalization(channels)
    assert norm.groups is None
    x = torch.randn(examples, channels, 3)
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_var), **SAME)
    norm.train()(x)
    norm(torch.randn(40, channels, 3))
    assert norm.groups == len(norm.running_mean) == groups
    assert copy.deepcopy(norm).groups == groups
    assert eval(repr(norm), vars(ab.nn)).running_var.shape == (groups,)


def test_what_was_learned_is_pooled_into_the_groups() -> None:
    """Running moments of the replaced BatchNorm: of each group's channels together, or repeated for slices."""
    bn = nn.BatchNorm2d(4).double()
    bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    mean, second = bn.running_mean.view(2, 2).mean(1), (bn.running_var + bn.running_mean**2).view(2, 2).mean(1)
    for norm in (ab.BGN(groups=2).build(bn), ab.BGN().build(bn)):
        norm.settle(2)
        torch.testing.assert_close(norm.running_mean, mean, **ORACLE)
        torch.testing.assert_close(norm.running_var, second - mean**2, **ORACLE)
    slices = ab.BGN(groups=8).build(bn)
    assert torch.equal(slices.running_mean, bn.running_mean.repeat_interleave(2))
    assert bn.running_mean.shape == (4,)
    again = slices.to_batchnorm()
    torch.testing.assert_close(again.running_var, bn.running_var, **ORACLE)
    assert ab.CBN().build(norm).running_mean.shape == (4,)


def test_a_settled_layers_state_settles_another() -> None:
    trained = BatchGroupNormalization(12)
    trained(torch.randn(8, 12, 3, 3))
    for groups in (None, trained.groups):
        norm = BatchGroupNormalization(12, groups)
        norm.load_state_dict(trained.state_dict(), strict=True)
        assert norm.groups == trained.groups == 3
        x = torch.randn(2, 12, 3, 3)
        assert torch.equal(norm.eval()(x), trained.eval()(x))
    with pytest.raises(ab.AnybatchError, match=r"3 groups.*groups=4 of 12 channels; build it with groups=3"):
        BatchGroupNormalization(12, 4).load_state_dict(trained.state_dict())
    with pytest.raises(ab.AnybatchError, match=r"groups=3 does not divide 8 channels"):
        BatchGroupNormalization(8).load_state_dict({**trained.state_dict(), "weight": torch.ones(8)})


def test_a_batchnorm_checkpoint_loads_into_a_settled_layer() -> None:
    bn = nn.BatchNorm2d(4)
    bn.running_mean.normal_()
    norm = BatchGroupNormalization(4, 2)
    norm.load_state_dict(bn.state_dict(), strict=True)
    torch.testing.assert_close(norm.running_mean, bn.running_mean.view(2, 2).mean(1), **SAME)


def test_slices_fix_the_inputs_size() -> None:
    for training in (True, False):
        norm = BatchGroupNormalization(4, 8).train(training)
        norm(torch.randn(2, 4, 3, 2))
        with pytest.raises(ab.AnybatchError, match=r"spatial size \(4, 2\).*first had \(3, 2\)"):
            norm(torch.randn(2, 4, 4, 2))
    with pytest.raises(ab.AnybatchError, match=r"2 slices.*\(3, 3\) of the input has 9 positions"):
        BatchGroupNormalization(4, 8)(torch.randn(2, 4, 3, 3))


def test_slices_keep_the_memory_format() -> None:
    outs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        norm = BatchGroupNormalization(4, 8)
        x = torch.arange(2 * 4 * 3 * 2.0).sin().view(2, 4, 3, 2).to(memory_format=layout)
        outs += [norm(x), norm.eval()(x)]
        assert all(out.is_contiguous(memory_format=layout) for out in outs[-2:])
    torch.testing.assert_close(outs[:2], outs[2:], **SAME)


def test_slices_cannot_be_folded_nor_weighed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), BatchGroupNormalization(4, 8)).eval()
    with pytest.raises(ab.AnybatchError, match="more than a scale and a shift"):
        ab.fold(model, example_inputs=torch.randn(1, 3, 4, 3))
    with pytest.raises(ab.AnybatchError, match="no norm of the model"):
        ab.weigh_examples_(model, 0.5)
    with pytest.raises(ab.AnybatchError, match=r"alpha=0.5 with groups=8"):
        BatchGroupNormalization(4, 8, alpha=0.5)


def test_groups_are_weighed_by_the_examples_own() -> None:
    """alpha 1 is GroupNorm."""
    norm, gn = random_affine(BatchGroupNormalization(4, 2, alpha=1.0, dtype=D)).eval(), nn.GroupNorm(2, 4, dtype=D)
    gn.weight, gn.bias = norm.weight, norm.bias
    same_as(norm, gn, batch((3, 4, 2, 5)))


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("groups", [2, 8])
def test_bgn_without_running_statistics(groups: int, track: bool) -> None:
    """Evaluation by the groups of the batch."""
    norm = random_affine(BatchGroupNormalization(4, groups, track_running_stats=False, dtype=D)).train(track)
    x = batch((3, 4, 2, 5))
    torch.testing.assert_close(norm(x), by_definition(x, groups, norm.weight, norm.bias, norm.eps)[0], **ORACLE)


# --- all three


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
        (lambda: ab.BatchGroupNorm(channel_groups=2.0), "channel_groups=2.0"),
        (lambda: ab.BatchGroupNorm(alpha=2), "alpha=2; give a number from 0 to 1"),
        (lambda: ab.BGN(0), "groups=0; give a whole number of at least 1, or None"),
        (lambda: BatchAndGroupNorm(12, 5), "channel_groups=5 does not divide 12 channels; choose one of 1, 2, 3, 4, 6"),
        (lambda: BatchGroupNormalization(12, 5), "groups=5 does not divide 12 channels; choose one of 1, 2, 3, 4, 6"),
        (lambda: BatchGroupNormalization(12, 30), "groups=30 does not divide 12 channels"),
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
