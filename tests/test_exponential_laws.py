"""Laws of the exponential window: its shares, its kinship with the ring, what sampling and storage may change."""

import pytest
import torch
from torch import Tensor, nn

from anybatch.nn import CrossIterationBatchNorm

from . import oracle
from .test_cbn import LAST, D, channels_of, every_map, gradients, last_moments, make, move, trained  # noqa: F401
from .tolerances import ORACLE

SIZES = (7, 1, 3, 2, 4)


@every_map
@pytest.mark.parametrize(("positions", "refresh"), [(None, 1), (5, 2), (5, 3)])
@pytest.mark.parametrize("pooling", ["samples", "equal"])
@pytest.mark.parametrize("expansion", ["deviation", "second_moment"])
def test_still_weights_make_it_batchnorm_on_the_weighed_concatenation(
    kind: str, positions: int | None, refresh: int, pooling: str, expansion: str
) -> None:
    """Whatever positions were seen; a value of a batch counts (3/4)^age, and so does a batch with equal pooling."""
    module, shape = make(kind)
    norm = CrossIterationBatchNorm(
        channels_of(module), 4, dtype=D, positions=positions, refresh=refresh, pooling=pooling, expansion=expansion
    ).follows(module)
    batches = [torch.randn(n, *shape, dtype=D) * 2 + 1 for n in SIZES]
    with torch.no_grad():
        for x in batches:
            out = norm(module(x))
        ys = [module(x) for x in batches]
        weights = [0.75**age / (1 if pooling == "samples" else len(x)) for age, x in enumerate(batches[::-1])][::-1]
        expected = oracle.normalise(ys[-1], *oracle.weighted_moments(ys, weights), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out, expected, **ORACLE)


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_the_newest_share_is_a_windows(window: int) -> None:
    """1/k, and each older one (1 - 1/k) of the next; batch t is one in channel t alone, so its mean is its share."""
    norm = CrossIterationBatchNorm(90, window=window, dtype=D, compensate=False)
    for channel in torch.eye(90, dtype=D):
        norm(channel.expand(2, -1).clone())
    decay = 1 - 1 / window
    expected = torch.tensor([decay**age / window for age in range(90)][::-1], dtype=D)
    torch.testing.assert_close(LAST[norm][0], expected / (1 - decay**90), **ORACLE)


def both_kinds(kind: str, expansion: str, steps: tuple[float, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Pooled moments, and their derivatives by the map's weights in a random direction; the weights move by ``steps``.

    Of the layer, and of the sum over batches of the ring's expansions with the layer's shares.
    """
    torch.manual_seed(1)
    module, shape = make(kind)
    norm = CrossIterationBatchNorm(
        channels_of(module), 4, dtype=D, positions=None, refresh=1, expansion=expansion, average_reductions=0
    ).follows(module)
    past = []
    for n, step in zip((7, 2, 3, 2, 4), steps, strict=True):
        past += trained(norm, module, [torch.randn(n, *shape, dtype=D) + 0.7], step)
    x = torch.randn(3, *shape, dtype=D) + 0.7
    y = oracle.run(module, module.weight, module.bias, x)
    carried = [entry.at(module.weight, module.bias, expansion == "second_moment") for entry in past]
    carried.append(oracle.batch_moments(y))
    assert all(bool((var > 0).all()) for _, var in carried)  # no floor
    counts = [entry.count for entry in past] + [y.numel() // y.shape[1]]
    weights = torch.tensor([n * 0.75**age for age, n in enumerate(counts[::-1])][::-1], dtype=D)
    means, variances = (torch.stack(moments, 1) for moments in zip(*carried, strict=True))
    mean = means @ (weights / weights.sum())
    var = (variances + (means - mean[:, None]).square()) @ (weights / weights.sum())
    expected = oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps)
    out = norm(module(x))
    cotangent = torch.randn_like(out)
    wanted = [module.weight, module.bias]
    return (
        [*LAST[norm], *gradients(out, wanted, cotangent)],
        [mean.detach(), var.detach(), *gradients(expected, wanted, cotangent)],
    )


@every_map
def test_moved_once_it_is_the_rings_expansions_with_its_shares(kind: str) -> None:
    """Of the second moment, which is linear: exactly."""
    for mine, theirs in zip(*both_kinds(kind, "second_moment", (0, 0, 0, 0, 0.01)), strict=True):
        torch.testing.assert_close(mine, theirs, **ORACLE)


@every_map
@pytest.mark.parametrize("expansion", ["deviation", "second_moment"])
def test_moved_often_it_is_so_up_to_the_second_order(kind: str, expansion: str) -> None:
    """The mean exactly; the variance differs by a quarter when the steps are half as large."""
    apart = []
    for step in (2e-4, 1e-4):
        (mean, var, *_), (same, other, *_) = both_kinds(kind, expansion, (step,) * 5)
        torch.testing.assert_close(mean, same, **ORACLE)
        apart.append((var - other).norm())
    assert apart[1] > 0
    torch.testing.assert_close(apart[0] / apart[1], torch.tensor(4.0, dtype=D), rtol=0.05, atol=0)


@every_map
@pytest.mark.parametrize(("positions", "refresh"), [(None, 1), (1, 1), (7, 1), (21, 2), (7, 3), (None, 4)])
@pytest.mark.parametrize("storage", ["full", "bfloat16"])
@pytest.mark.parametrize("average_reductions", [0, 8])
def test_loss_is_blind_to_the_weights_scale(
    kind: str, positions: int | None, refresh: int, storage: str, average_reductions: int
) -> None:
    """<dL/dW_c, W_c> vanishes up to eps whatever positions were seen, and up to the rounding of what is kept."""
    module, shape = make(kind)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.zero_()
    c = channels_of(module)
    norm = CrossIterationBatchNorm(
        c, 5, 1e-12, dtype=D, positions=positions, refresh=refresh, storage=storage,
        average_reductions=average_reductions,
    ).follows(module)  # fmt: skip
    for _ in range(5):
        out = norm(module(torch.randn(3, *shape, dtype=D) + 0.3))
        out.backward(torch.randn_like(out))
        with torch.no_grad():
            module.weight += 0.02 * torch.randn_like(module.weight)
    out = norm(module(torch.randn(3, *shape, dtype=D) + 0.3))
    (grad,) = torch.autograd.grad(out, module.weight, torch.randn_like(out))
    grad, rows = rows_of(module, grad), rows_of(module, module.weight.detach())
    rounding = 1e-8 if storage == "full" else 2**-8
    assert ((grad * rows).sum(1).abs() <= rounding * grad.norm(dim=1) * rows.norm(dim=1)).all()


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """One row an output channel."""
    if not isinstance(module, nn.ConvTranspose2d):
        return weight.flatten(1)
    return weight.view(module.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).flatten(1)
