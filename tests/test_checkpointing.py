"""Training under activation checkpointing is bit-identical to plain training, statistics and history included."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import anybatch as ab

from .test_contract import every_method, example
from .test_history import assert_equal
from .tolerances import REORDERED

# Said of the inner of two reentrant checkpoints, whose first run is without gradients.
nests = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
either_mode = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Residual(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Dropout(dropout), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Net(nn.Module):
    """Three stages; ``run`` says how they are run on an input."""

    run: Callable[..., Tensor] = staticmethod(lambda stages, x: stages(x))

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            Residual(dropout),
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.stages, x)


def whole(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    return checkpoint(stages, x, **how)


def block(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    first, middle, last = stages
    return last(checkpoint(middle, first(x), **how))


def nested(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    return checkpoint(partial(block, stages, **how), x, **how)


def sequential(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    return checkpoint_sequential(stages, 2, x, **how)


def map_alone(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    (conv, *rest), *later = stages
    return nn.Sequential(*rest, *later)(checkpoint(conv, x, **how))


def norm_alone(stages: nn.Sequential, x: Tensor, **how: Any) -> Tensor:
    (conv, norm, act), *later = stages
    return nn.Sequential(act, *later)(checkpoint(norm, conv(x), **how))


def trained(
    name: str,
    run: Callable[..., Tensor] | None,
    micro_batches: Sequence[int] = (3,),
    dropout: float = 0.0,
    autocast: torch.dtype | None = None,
    together: bool = False,
    steps: int = 2,
) -> tuple[dict[str, Tensor], nn.Module]:
    """Every step's outputs and gradients and the final parameters and statistics, by name; and the net.

    Args:
        name: of the method.
        run: how the stages are run; None for plainly.
        micro_batches: examples of each between two steps.
        dropout: its probability.
        autocast: its dtype.
        together: all forwards of a step come before its one backward.
        steps: of the optimizer.
    """
    torch.manual_seed(0)
    net = Net(dropout)
    report = ab.convert_(net, ab.METHODS[name].small, example_inputs=example())
    assert len(report.converted) == (0 if name == "bn" else 4), str(report)
    if run is not None:
        net.run = run
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    ab.attach(net, optimizer)
    seen: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        xs = [example(n).requires_grad_() for n in micro_batches]
        waiting = []
        for i, x in enumerate(xs):
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                out = net(x)
            assert out.dtype == (autocast or torch.float32)
            waiting.append((out, torch.randn_like(out)))
            seen[f"out {step} {i}"] = out.detach()
            if not together or i == len(xs) - 1:
                torch.autograd.backward(*zip(*waiting, strict=True))
                waiting = []
        seen |= {f"x {step} {i}": x.grad for i, x in enumerate(xs)}
        seen |= {f"{key} {step}": p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
    seen |= net.state_dict()
    if name == "bn":  # torch's own layer takes a batch in once more where a checkpoint runs it once more
        seen = {key: t for key, t in seen.items() if not key.rpartition(".")[2].startswith(("running_", "num_batches"))}
    return seen, net


def assert_identical(name: str, run: Callable[..., Tensor], **how: Any) -> None:
    expected, plain = trained(name, None, **how)
    got, net = trained(name, run, **how)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert value.isfinite().all(), key
        assert torch.equal(got[key], value), key
    assert_equal(ab.history_state_dict(net), ab.history_state_dict(plain))
    forwards = 2 * len(how.get("micro_batches", (3,)))
    for layer in net.modules():
        for history in getattr(layer, "histories", {}).values():
            assert history.forwards == forwards  # one entry a forward


@nests
@every_method
@either_mode
@pytest.mark.parametrize("run", [whole, block, nested, sequential])
def test_checkpointed_training_is_plain_training(name: str, run: Callable[..., Tensor], reentrant: bool) -> None:
    """The whole model, a part of it, a part within the whole, and by torch's helper for sequences."""
    assert_identical(name, partial(run, use_reentrant=reentrant))


@nests
@every_method
@either_mode
def test_with_micro_batches_and_dropout(name: str, reentrant: bool) -> None:
    """Unequal micro-batches between the steps, single examples too; the same units are dropped the second time."""
    assert_identical(name, partial(nested, use_reentrant=reentrant), micro_batches=(3, 1, 2), dropout=0.5)


@every_method
@either_mode
@pytest.mark.parametrize("run", [map_alone, norm_alone])
def test_a_boundary_between_a_map_and_its_norm(name: str, run: Callable[..., Tensor], reentrant: bool) -> None:
    """A reentrant checkpoint runs the norm again on a detached copy of its input, which says nothing of the map."""
    if reentrant and run is norm_alone and ab.METHODS[name].needs_map:
        with pytest.raises(ab.AnybatchError, match="not the untouched output"):
            trained(name, partial(run, use_reentrant=True))
        return
    assert_identical(name, partial(run, use_reentrant=reentrant))


@every_method
@either_mode
def test_with_autocast(name: str, reentrant: bool) -> None:
    dtype = torch.float16 if reentrant else torch.bfloat16
    assert_identical(name, partial(block, use_reentrant=reentrant), autocast=dtype, micro_batches=(2, 1))


@every_method
def test_selective_checkpoints(name: str) -> None:
    """What convolutions put out is kept, and the rest computed anew."""
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    assert_identical(name, partial(whole, use_reentrant=False, context_fn=kept), micro_batches=(3, 1))


@every_method
@either_mode
def test_several_forwards_before_one_backward(name: str, reentrant: bool) -> None:
    run = partial(block, use_reentrant=reentrant)
    if not reentrant:
        assert_identical(name, run, micro_batches=(3, 1, 2), together=True)
        return
    # A reentrant checkpoint adds up each forward's part of a gradient by itself: (a3 + b3) + (a2 + b2) where plain
    # autograd adds ((a3 + b3) + a2) + b2, a from the map and b from its norm. Equal up to that.
    once = {"micro_batches": (3, 1, 2), "together": True, "steps": 1}  # a second would amplify it
    (expected, _), (got, _) = (trained(name, r, **once) for r in (None, run))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, **REORDERED)


@every_method
def test_the_same_batch_twice_before_one_backward(name: str) -> None:
    """Their moments are equal, and what a method with a memory normalises them by is not."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        ab.convert_(net, ab.METHODS[name].small, example_inputs=example())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ab.attach(net, optimizer)
        net(example(2) + 1)
        x = example(2)
        outs = [checkpoint(net, x, use_reentrant=False) if checkpointed else net(x) for _ in range(2)]
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_method
@either_mode
def test_a_batch_that_is_not_finite(name: str, reentrant: bool) -> None:
    """It is recognised when it is run again, and what it leaves is what it leaves in plain training."""
    states = []
    for run in (None, partial(whole, use_reentrant=reentrant)):
        torch.manual_seed(0)
        net = Net(0.0)
        ab.convert_(net, ab.METHODS[name].small, example_inputs=example())
        if run is not None:
            net.run = run
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ab.attach(net, optimizer)
        batches = [example(2) for _ in range(3)]
        batches[1][1, 2, 4, 3] = float("nan")
        for x in batches:
            out = net(x.requires_grad_())
            net.zero_grad()
            out.backward(torch.randn_like(out))
        states.append([out, *(p.grad for p in net.parameters() if p.grad is not None)])
        if name != "bn":
            assert all(t.isfinite().all() for t in states[-1])
    assert name == "bn" or all(torch.equal(a, b) for a, b in zip(*states, strict=True))


class Head(nn.Module):
    """One convolution and norm, called several times, as a head on several levels is."""

    def __init__(self, mode: str, levels: int) -> None:
        super().__init__()
        self.mode, self.levels = mode, levels
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def inner(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        for _ in range(self.levels):
            reentrant = self.mode == "reentrant"
            x = self.inner(x) if self.mode == "plain" else checkpoint(self.inner, x, use_reentrant=reentrant)
        return x


def trained_head(mode: str, levels: int, steps: int = 6) -> tuple[list[Tensor], nn.Module]:
    torch.manual_seed(0)
    net = Head(mode, levels)
    ab.convert_(net, ab.CBN(window=4, average_reductions=5), example_inputs=example())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        # Accumulated over two batches; not over several levels too, where nested backwards add up in another order.
        for _ in range(2 if levels == 1 else 1):
            out = net(torch.randn(2, 3, 9, 7, generator=generator))
            out.backward(torch.randn(out.shape, generator=generator))
            seen.append(out.detach())
        seen += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return seen, net


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_a_head_checkpointed_on_every_level(mode: str, levels: int) -> None:
    plain, net = trained_head("plain", levels)
    checkpointed, other = trained_head(mode, levels)
    if mode == "reentrant" and levels > 1:  # added up in another order, as above
        scale = max(a.abs().max() for a in plain)  # a bias before a norm has a gradient of nothing but rounding
        for a, b in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(a / scale, b / scale, **REORDERED)
        return
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert_equal(ab.history_state_dict(other), ab.history_state_dict(net))
    for (name, a), (_, b) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert net.bn.histories[0].forwards == (12 if levels == 1 else 6 * levels)  # one entry a forward


def test_recomputing_something_else_is_an_error() -> None:
    conv, bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    net = nn.Sequential(conv, bn)
    ab.convert_(net, ab.CBN(), example_inputs=torch.randn(2, 2, 5, 5))
    noise = iter([0.0, 1.0])
    out = checkpoint(
        lambda x: net(x + x * next(noise)), torch.randn(2, 2, 5, 5, requires_grad=True), use_reentrant=False
    )
    with pytest.raises(ab.AnybatchError, match="deterministic"):
        out.backward(torch.randn_like(out))


@pytest.mark.parametrize(("mode", "kept"), [("plain", 0), ("not reentrant", 3), ("reentrant", 3)])
def test_what_waits_for_a_second_run_is_what_a_checkpoint_ran(mode: str, kept: int) -> None:
    """Weight-sized tensors hang on it: nothing in plain training, the last step's levels under a checkpoint."""
    _, net = trained_head(mode, levels=3)
    assert len(net.bn._replay._runs) == kept
    assert len(net.stem_bn._replay._runs) == 0
