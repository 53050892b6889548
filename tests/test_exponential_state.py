"""What the exponential window keeps, when it writes over it, and what sampling and rounding change of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.layers import exponential
from anybatch.nn import CrossIterationBatchNorm

from .test_cbn import D
from .test_history import assert_equal

every_storage = pytest.mark.parametrize("storage", ["full", "bfloat16"])


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 9, 8)


def net(storage: str, refresh: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    ab.convert_(model, ab.CBN(window=4, positions=20, refresh=refresh, storage=storage), example_inputs=image())
    return model


def ordinary(model: nn.Module) -> None:
    out = model(image())
    out.backward(torch.randn_like(out))


def two_forwards_first(model: nn.Module) -> None:
    outs = [model(image()), model(image(3))]
    for out in outs:
        out.backward(torch.randn_like(out))


def retained(model: nn.Module) -> None:
    out, cotangent = model(image()), torch.randn(2, 4, 5, 4)
    out.backward(cotangent, retain_graph=True)
    model(image())
    out.backward(cotangent)


def dropped(model: nn.Module) -> None:
    model(image())
    ordinary(model)


def checkpointed(model: nn.Module) -> None:
    for reentrant in (False, True):
        out = checkpoint(model, image().requires_grad_(), use_reentrant=reentrant)
        out.backward(torch.randn_like(out))


def checkpointed_twice(model: nn.Module) -> None:
    outs = [checkpoint(model, image(), use_reentrant=False) for _ in range(2)]
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def offloaded(model: nn.Module) -> None:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        outs = [model(image()), model(image())]
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def without_gradient(model: nn.Module) -> None:
    out = model(image())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model(image())
    out.backward(torch.randn_like(out))


@every_storage
@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize(
    "step",
    [
        *(ordinary, two_forwards_first, retained, dropped, checkpointed, checkpointed_twice),
        *(offloaded, without_gradient),
    ],
    ids=lambda step: step.__name__,
)
def test_writing_in_place_changes_nothing(
    step: Callable[[nn.Module], None], refresh: int, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and history, bit for bit, are those of a history that never writes over its covariance."""
    runs = []
    for in_place in (True, False):
        if not in_place:
            advance = exponential.advance
            monkeypatch.setattr(exponential, "advance", lambda *args, advance=advance: advance(*args[:-1], False))
        model = net(storage, refresh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        grads = []
        for _ in range(3):
            optimizer.zero_grad()
            step(model)
            grads += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
        runs.append((grads, ab.history_state_dict(model)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert_equal(runs[0][1], runs[1][1])


@every_storage
@pytest.mark.parametrize("accumulated", [1, 3])
def test_an_ordinary_loop_keeps_one_covariance(storage: str, accumulated: int) -> None:
    """One that a waiting graph holds is left alone; the next is written elsewhere."""
    model = net(storage)
    ordinary(model)
    history = model[1].histories[0]
    covariance, where = history.covariance, history.covariance.data_ptr()
    for _ in range(3):
        for _ in range(accumulated):
            ordinary(model)
        assert history.covariance.data_ptr() == where
    waiting = model(image())
    before = history.covariance.clone()
    model(image())
    assert history.covariance.data_ptr() != where
    assert torch.equal(covariance, before)
    waiting.backward(torch.randn_like(waiting))


@pytest.mark.parametrize("window", [2, 8, 32, 256])
def test_memory_is_that_of_one_weight_at_any_window(window: int) -> None:
    """In a convolution from 64 to 64: 1.03 weights in float32, little more than half of that in bfloat16."""
    weight = nn.Conv2d(64, 64, 3).weight
    sizes = {}
    for storage in ("full", "bfloat16"):
        conv = nn.Conv2d(64, 64, 3)
        norm = CrossIterationBatchNorm(64, window=window, storage=storage).follows(conv)
        norm(conv(torch.randn(2, 64, 5, 5))).sum().backward()
        sizes[storage] = sum(t.numel() * t.element_size() for t in norm.histories[0].tensors())
    own = weight.numel() * weight.element_size()
    assert own < sizes["full"] <= 1.03 * own
    assert own / 2 < sizes["bfloat16"] <= 0.53 * own


def test_bfloat16_differs_by_its_rounding() -> None:
    """Of every batch's 2^-9 of the covariance, of which (1 - 1/k)^age is left: k 2^-9 at most, times its largest."""
    runs = []
    for storage in ("full", "bfloat16"):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 6, 3, dtype=D)
        norm = CrossIterationBatchNorm(6, window=5, storage=storage, dtype=D).follows(conv)
        largest = torch.zeros((), dtype=D)
        for _ in range(12):
            out = norm(conv(torch.randn(2, 3, 9, 8, dtype=D)))
            largest = largest.maximum(norm.histories[0].covariance.abs().max().to(D))
        runs.append((out, norm.histories[0].covariance, norm.histories[0].scalars[:2], largest))
    (out, covariance, moments, largest), (rounded_out, rounded, rounded_moments, _) = runs
    assert rounded.dtype == torch.bfloat16
    assert covariance.dtype == D
    assert 0 < (rounded.to(D) - covariance).abs().max() <= 5 * 2**-9 * 1.01 * largest
    # Of still weights the ratio <D, W> / var_at is one but for that rounding, its square off by twice as much.
    torch.testing.assert_close(rounded_moments, moments, rtol=5 * 2**-7, atol=5 * 2**-7)
    torch.testing.assert_close(rounded_out, out, rtol=5 * 2**-7, atol=5 * 2**-7)


def past_gradient(positions: int | None, number: int, expansion: str) -> Tensor:
    """Of the weight, after one batch at other weights, with the positions of batch ``number`` and the next."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, dtype=D)
    norm = CrossIterationBatchNorm(
        4, window=8, dtype=D, positions=positions, refresh=1, expansion=expansion, average_reductions=0
    ).follows(conv)
    norm.history_of(0).forwards.fill_(number)
    x = torch.randn(2, 2, 3, 18, 18, dtype=D).cumsum(-1)
    norm(conv(x[0]))
    with torch.no_grad():
        conv.weight += 0.02 * torch.randn_like(conv.weight)
    out = norm(conv(x[1]))
    return torch.autograd.grad(out, conv.weight, torch.randn_like(out))[0].flatten()


@pytest.mark.parametrize("expansion", ["deviation", "second_moment"])
def test_over_many_draws_the_sampled_gradient_is_the_exact_one(expansion: str) -> None:
    """Over the 32 of a period, to three standard errors; a single draw is three times as far off and more."""
    exact = past_gradient(None, 0, expansion)
    draws = torch.stack([past_gradient(64, number, expansion) for number in range(32)])
    standard_error = draws.std(0).norm() / 32**0.5
    scatter = (draws - exact).norm(dim=1).mean()
    off = (draws.mean(0) - exact).norm()
    assert off <= 3 * standard_error
    assert off < scatter / 3
