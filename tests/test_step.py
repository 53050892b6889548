"""The differentiable parts that layers are put together from, by numerical differentiation in float64."""

import pytest
import torch
from torch import Tensor, nn

from anybatch.core.step import measure, normalise_by

from .tolerances import HALF, REORDERED, SAME

D = torch.float64


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 2), (1, 4, 3, 3), (2, 4, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_gradients(shape: tuple[int, ...], by_example: bool, last: bool) -> None:
    """Of every argument, each in every shape it may have; moments that are expanded or shared too."""
    y = torch.randn(shape, dtype=D)
    if last and len(shape) == 4:
        y = y.to(memory_format=torch.channels_last)
    examples = shape[0] if by_example else 1
    weight = torch.randn(4, dtype=D)
    bias = torch.randn(examples, 4, dtype=D)

    def normalised(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, var = measure(y, by_example)
        assert mean.shape == var.shape == (examples, 4)
        shared = mean.mean(-1, keepdim=True).expand(examples, 4)
        return normalise_by(y, 0.5 * mean + shared, var.mean(0) * weight.exp(), weight, bias, 0.1)

    given = tuple(t.requires_grad_() for t in (y, weight, bias))
    assert torch.autograd.gradcheck(normalised, given)
    out = normalised(*given)
    assert out.stride() == y.stride()


def test_without_affine_parameters_and_for_frozen_inputs() -> None:
    y, mean, var = measure(torch.randn(3, 4, 5))
    assert not normalise_by(y, mean, var, None, None, 0.1).requires_grad
    weight = torch.randn(4, requires_grad=True)
    normalise_by(y, mean, var, weight, None, 0.1).sum().backward()
    torch.testing.assert_close(weight.grad, normalise_by(y, mean, var, None, None, 0.1).sum((0, 2)), **REORDERED)


def test_is_torchs_batchnorm() -> None:
    x = torch.randn(3, 4, 5, 6) * 2 + 1
    bn = nn.BatchNorm2d(4)
    torch.testing.assert_close(normalise_by(*measure(x), bn.weight, bn.bias, bn.eps), bn(x), **SAME)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("by_example", [False, True])
def test_half_precision(dtype: torch.dtype, by_example: bool) -> None:
    """Moments in float32, output and gradient in the input's dtype and near float32's."""
    x = (torch.randn(2, 3, 8, 8) * 3 + 5).to(dtype)
    g = torch.randn(2, 3, 8, 8)
    results = []
    for wide in (False, True):
        y = (x.float() if wide else x.clone()).requires_grad_()
        z, mean, var = measure(y, by_example)
        assert mean.dtype == torch.float32
        out = normalise_by(z, mean, var, None, None, 1e-5)
        out.backward(g.to(out.dtype))
        assert out.dtype == y.grad.dtype == y.dtype
        results.append((out.float(), y.grad.float()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **HALF[dtype])


@pytest.mark.parametrize("by_example", [False, True])
def test_a_single_example_cut_from_a_channels_last_batch(by_example: bool) -> None:
    """Its first stride is odd, and torch's own BatchNorm then sums the wrong elements for a contiguous gradient."""
    batch = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    odd, g = batch[0][None], torch.randn(1, 4, 3, 3)
    assert odd.stride(0) == 4
    grads = []
    for x in (odd, odd.contiguous()):
        weight, x = torch.ones(4, requires_grad=True), x.detach().requires_grad_()
        out = normalise_by(*measure(x, by_example), weight, None, 1e-5)
        grads.append(torch.autograd.grad(out, [x, weight], g))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **SAME)
