"""The exponential window against its equations, written out and differentiated by autograd, and its laws."""

import pytest
import torch
from torch import Tensor

from anybatch.core.sampling import looks, positions
from anybatch.nn import CrossIterationBatchNorm

from . import oracle
from .test_cbn import D, channels_of, every_map, gradients, make, move
from .tolerances import ORACLE


def looked_at(y: Tensor, samples: int | None, number: int) -> Tensor:
    """Flat indices of the positions of a batch that the layer looks at."""
    size = tuple(y.shape[2:])
    every = y.numel() // y.shape[1]
    if samples is None:
        return torch.arange(every)
    example, *coordinates = positions(len(y), size, samples, torch.tensor(number % 32))
    flat = example
    for length, coordinate in zip(size, coordinates, strict=True):
        flat = flat * length + coordinate
    return flat


@every_map
@pytest.mark.parametrize(("samples", "refresh"), [(None, 1), (5, 1), (None, 2), (5, 3)])
@pytest.mark.parametrize("gradient", ["history", "current"])
@pytest.mark.parametrize(("pooling", "expansion"), [("samples", "deviation"), ("equal", "second_moment")])
def test_outputs_and_every_gradient(
    kind: str, samples: int | None, refresh: int, gradient: str, pooling: str, expansion: str
) -> None:
    """Against float64 autograd through the written-out recursion, over unequal batches with weights that move."""
    module, shape = make(kind)
    c = channels_of(module)
    norm = CrossIterationBatchNorm(
        c, window=4, dtype=D, positions=samples, refresh=refresh, gradient=gradient, pooling=pooling,
        expansion=expansion, average_reductions=0,
    ).follows(module)  # fmt: skip
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    by_hand = oracle.Exponential(
        3 / 4, second_moment=expansion == "second_moment", equal=pooling == "equal", detach=gradient == "current"
    )
    for number, n in enumerate((3, 2, 5, 4, 3, 2)):
        x = (torch.randn(n, *shape, dtype=D) + 0.7).requires_grad_()
        out = norm(module(x))
        y = oracle.run(module, module.weight, module.bias, x)
        p = oracle.patches(module, module.weight, module.bias, x.detach())
        stretch, looked = looks(number, refresh)
        at = looked_at(y, samples, stretch) if looked else None
        mean, var = by_hand.pool(y, p, at, module.weight, module.bias)
        expected = oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(out, expected, **ORACLE)
        wanted = [x, module.weight, module.bias, norm.weight, norm.bias]
        cotangent = torch.randn_like(out)
        for mine, theirs in zip(gradients(out, wanted, cotangent), gradients(expected, wanted, cotangent), strict=True):
            torch.testing.assert_close(mine, theirs, **ORACLE)
        move(module, 0.02)
