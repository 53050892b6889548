"""What the tests of the layers share: inputs, and comparisons of outputs and gradients under random cotangents."""

import pytest
import torch
from torch import Tensor, nn

from .tolerances import ORACLE

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
