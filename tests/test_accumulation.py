"""Gradients accumulated over micro-batches: what each method's sum of gradients and statistics are."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab

from . import oracle
from .test_contract import Net, every_method
from .tolerances import ORACLE

D = torch.float64
# One, two, three, eight micro-batches; unequal ones, the last one smaller, one example each.
SIZES = [(4,), (3, 2), (1, 1), (2, 4, 1), (3, 3, 2), (1,) * 8, (2, 1, 3, 2, 2, 4, 2, 1)]
every_split = pytest.mark.parametrize("sizes", SIZES, ids=str)

# How a training forward of a method depends on those before it: not at all, but for these.
POOLING = {"cbn", "cbn-naive", "cbn-paper", "iebn-cbn", "accumulated"}
# A micro-batch of whole groups is treated as the same examples within a larger batch.
BY_EXAMPLE = {"gn": 1, "proxynorm": 1, "proxynorm-group": 1, "ghost": 2, "batch-group": 2}


def converted(name: str, **options: object) -> nn.Module:
    """In float64. A window covers the eight micro-batches unless it is said otherwise."""
    torch.manual_seed(0)
    net = Net().double()
    config = ab.METHODS[name].make(**options) if options else ab.METHODS[name].small
    report = ab.convert_(net, config, example_inputs=batch(2))
    assert len(report.converted) == (0 if name == "bn" else 2), str(report)
    return net


def batch(n: int) -> Tensor:
    return torch.randn(n, 3, 9, 7, dtype=D)


def gradients(net: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    parameters = list(net.parameters())
    grads = torch.autograd.grad(net(x), parameters, cotangent, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def accumulate(net: nn.Module, xs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    for x, cotangent in zip(xs, cotangents, strict=True):
        net(x).backward(cotangent)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]


@pytest.mark.parametrize("name", [name for name in ab.METHODS if name not in POOLING])
@every_split
def test_micro_batches_add_up(name: str, sizes: tuple[int, ...]) -> None:
    """The sum is of every micro-batch's gradient as a copy gives it that has seen no other."""
    net = converted(name)
    if name == "bgn":
        net(batch(2))  # settles its groups
    xs, copies = [batch(n) for n in sizes], [copy.deepcopy(net) for _ in sizes]
    cotangents = [torch.randn(n, 8, 4, 3, dtype=D) for n in sizes]
    alone = [gradients(*each) for each in zip(copies, xs, cotangents, strict=True)]
    for got, parts in zip(accumulate(net, xs, cotangents), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, sum(parts), **ORACLE)


@pytest.mark.parametrize("name", BY_EXAMPLE)
@every_split
def test_any_split_into_whole_groups_is_the_whole_batch(name: str, sizes: tuple[int, ...]) -> None:
    xs = [batch(n * BY_EXAMPLE[name]) for n in sizes]
    cotangents = [torch.randn(len(x), 8, 4, 3, dtype=D) for x in xs]
    whole = gradients(converted(name), torch.cat(xs), torch.cat(cotangents))
    for got, expected in zip(accumulate(converted(name), xs, cotangents), whole, strict=True):
        torch.testing.assert_close(got, expected, **ORACLE)


@pytest.mark.parametrize("name", ["accumulated", "cbn", "cbn-naive", "cbn-paper"])
@every_split
def test_the_last_micro_batch_sees_the_moments_of_all(name: str, sizes: tuple[int, ...]) -> None:
    """Exactly, in each of three accumulated batches: the window just covers one, and the weights move between them."""
    if name == "cbn-paper":
        sizes = (2,) * len(sizes)  # its entries pool equally
    ring = {} if name in ("accumulated", "cbn-paper") else {"kind": "ring"}
    net = converted(name, **({} if name == "accumulated" else {"window": len(sizes)} | ring))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ab.attach(net, optimizer)
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {net.bn1: [], net.bn2: []}
    for norm in seen:
        norm.register_forward_hook(lambda norm, args, out: seen[norm].append((args[0].detach(), out.detach())))
    for _ in range(3):
        for n in sizes:
            out = net(batch(n))
            out.backward(torch.randn_like(out))
        for norm, runs in seen.items():
            y, out = runs[-1]
            mean, var = oracle.batch_moments(torch.cat([y for y, _ in runs]))
            torch.testing.assert_close(out, oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps), **ORACLE)
            runs.clear()
        optimizer.step()
        optimizer.zero_grad()


@every_split
@pytest.mark.parametrize("kind", ["exponential", "ring"])
def test_the_last_micro_batchs_gradient(sizes: tuple[int, ...], kind: str) -> None:
    """CBN's map gets it as float64 autograd through BatchNorm of the concatenation has it, weighed as the kind has it.

    Without the averaged reductions, which concern earlier layers.
    """
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, dtype=D), nn.BatchNorm2d(8, dtype=D)
    net = nn.Sequential(conv, norm)
    ab.convert_(net, ab.CBN(8, kind=kind, positions=None, refresh=1, average_reductions=0), example_inputs=batch(2))
    xs = [batch(n) for n in sizes]
    for x in xs:
        out = net(x)
    cotangent, wanted = torch.randn_like(out), [*conv.parameters(), *net[1].parameters()]
    got = torch.autograd.grad(out, wanted, cotangent)
    ys = [conv(x) for x in xs]
    weights = [1.0 if kind == "ring" else (7 / 8) ** age for age in reversed(range(len(xs)))]
    moments = oracle.weighted_moments(ys, weights)
    expected = oracle.normalise(ys[-1], *moments, net[1].weight, net[1].bias, net[1].eps)
    for a, b in zip(got, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


@every_method
@pytest.mark.parametrize("sizes", [(2, 4, 1), (1,) * 8], ids=str)
def test_what_is_counted(name: str, sizes: tuple[int, ...]) -> None:
    """Forwards, but accumulated batches where those are the unit; histories have one entry a micro-batch."""
    net = converted(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ab.attach(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    for step in range(1, 3):
        weights = [p.detach().clone() for p in net.parameters()]
        for n in sizes:
            out = net(batch(n))
            out.backward(torch.randn_like(out))
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
        forwards = step * len(sizes)
        for norm in (net.bn1, net.bn2):
            if getattr(norm, "uses_running", isinstance(norm, nn.BatchNorm2d)):
                assert norm.num_batches_tracked == (step if name == "accumulated" else forwards)
                assert norm.running_mean.abs().min() > 0
            for history in getattr(norm, "histories", {}).values():
                assert history.forwards == forwards
                if "slot" in history.fields:
                    assert (history.count > 0).sum() == min(forwards, norm.window - 1)
                else:  # what a new batch of each size counts, and less of what was there
                    assert history.count[0] > 0
                    assert (history.count <= sum(sizes) * step * 12).all()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
