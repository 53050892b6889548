"""Batch Group Normalization against its equation, and the laws that hold it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import BatchGroupNormalization

from .norm_checks import (
    SHAPES,
    D,
    batch,
    every_shape,
    random_affine,
    same_as,
    same_buffers,
    same_gradients,
    torch_norm,
)
from .tolerances import ORACLE, SAME


def by_definition(y: Tensor, groups: int, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the G means and variances of x read as (N, G, D)."""
    x = y.reshape(len(y), groups, -1)
    mean = x.mean((0, 2))
    var = (x - mean.view(-1, 1)).square().mean((0, 2))
    y_hat = ((x - mean.view(-1, 1)) / (var + eps).sqrt().view(-1, 1)).reshape(y.shape)
    shape = (1, -1, *[1] * (y.dim() - 2))
    return gamma.view(shape) * y_hat + beta.view(shape), mean, var


def cuts(shape: tuple[int, ...], groups: int) -> bool:
    """Whether there are such groups of 4 channels, with more than one value each."""
    positions = torch.Size(shape[2:]).numel()
    return positions % max(1, groups // 4) == 0 and shape[0] * 4 * positions > groups


@pytest.mark.parametrize(("shape", "groups"), [(s, g) for s in SHAPES for g in (1, 2, 4, 8, 12) if cuts(s, g)], ids=str)
def test_bgn(shape: tuple[int, ...], groups: int) -> None:
    """Outputs, every gradient, running statistics with the group's Bessel correction, and evaluation."""
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


def test_what_cannot_be_settled_changes_nothing() -> None:
    norm = BatchGroupNormalization(4, alpha=0.5)
    x = torch.randn(3, 4, 2, 5)
    wanted = norm.eval()(x)
    for refused in (8, 3):
        with pytest.raises(ab.AnybatchError, match=f"groups={refused}"):
            norm.settle(refused)
    assert norm.groups is None
    assert norm.options == {"groups": None}
    assert norm.can_weigh
    assert torch.equal(norm(x), wanted)


def test_training_goes_on_after_a_first_batch_in_inference_mode() -> None:
    norm, bn = BatchGroupNormalization(8), BatchGroupNormalization(8, 2)
    x, y = torch.randn(8, 8, 3), torch.randn(4, 8, 3, requires_grad=True)
    with torch.inference_mode():
        norm(x), bn(x)
    assert norm.groups == 2
    assert not norm.running_mean.is_inference()
    assert torch.equal(norm(y), bn(y))
    norm(y).sum().backward()
    for a, b in zip(norm.buffers(), bn.buffers(), strict=True):
        assert a.shape == b.shape
