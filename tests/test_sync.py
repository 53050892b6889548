"""Ranks with ``sync`` are one process with the concatenated batch: outputs, gradients, statistics, weights."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm

from .ranks import on_ranks
from .test_contract import Net
from .tolerances import ORACLE, REORDERED

SYNCED = {
    "weighed": ab.ExampleWeighedBN(alpha=0.0, sync=True),
    "cbn": ab.CBN(window=3, sync=True),
    "cbn-second": ab.CBN(window=3, pooling="equal", expansion="second_moment", sync=True),
    "cbn-examples": ab.CBN(window_examples=4, sync=True),  # full ones, and smaller ones after them
    "cbn-ring": ab.CBN(window=3, kind="ring", sync=True),
    "cbn-paper": dataclasses.replace(ab.CBN.paper(window=3), running="total", momentum_batch=32, sync=True),
    "cbn-naive": ab.CBN(3, compensate=False, sync=True),
    "accumulated": ab.AccumulatedBN(sync=True),
    "renorm": ab.BatchRenorm(ramp_from=1, ramp_to=2, sync=True),
    "bgn": ab.BGN(groups=4, sync=True),
    "bgn-slices": ab.BGN(groups=16, sync=True),
    "iebn": ab.IEBN(sync=True),
    "iebn-cbn": ab.IEBN(window=3, sync=True),
}
STEPS = 4
SIZES = {2: [(3, 1), (2, 2), (0, 4), (1, 0)], 4: [(1, 2, 0, 1), (1, 1, 1, 1), (0, 0, 0, 2), (2, 0, 1, 1)]}


def build(config: Any, dtype: torch.dtype, positions: int | None = None, **options: Any) -> nn.Module:
    """Which positions a rank looks at is its own: of one process and several, only all are the same."""
    torch.manual_seed(1)
    net = Net()
    ab.convert_(net, config, example_inputs=torch.randn(3, 3, 21, 18), **options)
    for layer in net.modules():
        if isinstance(layer, CrossIterationBatchNorm):
            layer.positions = positions
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.to(dtype)


def batches(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Of every step: the ranks' parts of the images, and of the cotangents."""
    g = torch.Generator().manual_seed(2)
    whole = [(torch.randn(sum(s), 3, 21, 18, generator=g), torch.randn(sum(s), 8, 10, 8, generator=g)) for s in sizes]
    return [(x.to(dtype).split(list(s)), c.to(dtype).split(list(s))) for (x, c), s in zip(whole, sizes, strict=True)]


def trained(rank: int, world: int, config: Any, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the summed gradients of every step, then parameters and buffers; of one process without ranks too."""
    net = build(config, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    ab.attach(net, optimizer)
    seen = []
    for images, cotangents in batches(sizes, dtype):
        optimizer.zero_grad()
        mine = (images[rank], cotangents[rank]) if world > 1 else (torch.cat(images), torch.cat(cotangents))
        x = mine[0].requires_grad_()
        out = net(x)
        out.backward(mine[1])
        seen += [out.detach(), x.grad]
        for p in net.parameters():
            if world > 1:
                dist.all_reduce(p.grad)
            seen.append(p.grad.clone())
        optimizer.step()
    return [*seen, *(t.detach() for t in net.state_dict().values())]


def joined(ranks: list[list[Tensor]], like: list[Tensor]) -> list[Tensor]:
    """The ranks' parts put together where they are parts; what all have alike from rank 0."""
    out = []
    for parts, whole in zip(zip(*ranks, strict=True), like, strict=True):
        if parts[0].shape != whole.shape or (whole.dim() == 4 and sum(len(p) for p in parts) == len(whole)):
            out.append(torch.cat(parts))
        else:
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], rtol=0, atol=0)
            out.append(parts[0])
    return out


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", SYNCED)
def test_ranks_are_one_process_with_the_whole_batch(name: str, world: int) -> None:
    """Four steps with moving weights, unequal and empty ranks, in float64."""
    args = SYNCED[name], SIZES[world], torch.float64
    alone = trained(0, 1, *args)
    scale = max(t.abs().max() for t in alone)  # a bias before a norm has a gradient of nothing but rounding
    for a, b in zip(joined(on_ranks(world, trained, *args), alone), alone, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **ORACLE)


@pytest.mark.parametrize("name", SYNCED)
def test_ranks_are_one_process_in_float32(name: str) -> None:
    """To 1e-5 of the largest gradient, or as far as one process is off float64 itself."""
    args = SYNCED[name], SIZES[2]
    exact, alone = trained(0, 1, *args, torch.float64), trained(0, 1, *args, torch.float32)
    scale = max(t.abs().max() for t in alone)
    off = 4 * max(float((b - c).abs().max() / scale) for b, c in zip(alone, exact, strict=True))
    for a, b in zip(joined(on_ranks(2, trained, *args, torch.float32), alone), alone, strict=True):
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=max(REORDERED["atol"], off))


def in_two_halves(rank: int, world: int, name: str) -> list[Tensor]:
    """Each half of the ranks is a group of its own."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = build(SYNCED[name], torch.float64, process_group=halves[rank // 2])
    (images, cotangents), *_ = batches([(1, 2, 2, 1)], torch.float64)
    out = net(images[rank])
    out.backward(cotangents[rank])
    for p in net.parameters():
        dist.all_reduce(p.grad, group=halves[rank // 2])
    return [out.detach(), *(p.grad for p in net.parameters()), *(t.detach() for t in net.state_dict().values())]


@pytest.mark.parametrize("name", ["cbn", "iebn"])
def test_subgroups(name: str) -> None:
    ranks = on_ranks(4, in_two_halves, name)
    for half in (0, 1):
        net = build(SYNCED[name], torch.float64)
        (images, cotangents), *_ = batches([(1, 2, 2, 1)], torch.float64)
        out = net(torch.cat(images[2 * half : 2 * half + 2]))
        out.backward(torch.cat(cotangents[2 * half : 2 * half + 2]))
        parts = ranks[2 * half : 2 * half + 2]
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach(), **ORACLE)
        wanted = [*(p.grad for p in net.parameters()), *net.state_dict().values()]
        for a, b in zip(parts[1][1:], wanted, strict=True):
            torch.testing.assert_close(a, b, **ORACLE)


def copied(rank: int, world: int) -> str:
    net = build(SYNCED["cbn"], torch.float32)
    net.bn1.process_group = dist.group.WORLD
    twin = copy.deepcopy(net)
    twin.eval()(torch.randn(1, 3, 9, 8))
    with pytest.raises(ab.AnybatchError, match="process_group") as error:
        twin.train()(torch.randn(1, 3, 9, 8))
    return str(error.value)


def test_a_copy_does_not_take_the_group_along() -> None:
    assert len(on_ranks(2, copied)) == 2


def evaluates_on_one(rank: int, world: int, name: str) -> Tensor | None:
    net = build(SYNCED[name], torch.float32)
    net(torch.randn(2, 3, 9, 8))
    net.eval()
    return net(torch.randn(2, 3, 9, 8)).detach() if rank == 0 else None


@pytest.mark.parametrize("name", SYNCED)
def test_evaluation_on_one_rank_does_not_hang(name: str) -> None:
    assert torch.isfinite(on_ranks(2, evaluates_on_one, name)[0]).all()


@pytest.mark.parametrize("name", SYNCED)
def test_without_a_process_group_it_is_the_plain_layer(name: str) -> None:
    outs = []
    for config in (SYNCED[name], dataclasses.replace(SYNCED[name], sync=False)):
        net = build(config, torch.float32)
        outs.append(net(batches([(2, 1)], torch.float32)[0][0][0]))
    assert torch.equal(*outs)


def one_value(rank: int, world: int, name: str) -> list[Tensor]:
    """A value a channel on one rank of two, none on the other: no variance, so the running moments."""
    layer = SYNCED[name].build(nn.BatchNorm1d(16, dtype=torch.float64))
    layer.running_mean.fill_(2.0)
    layer.running_var.fill_(4.0)
    x = torch.randn(1 - rank, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.backward(torch.randn_like(out))
    return [x.detach(), out.detach(), x.grad, layer.running_mean.clone()]


@pytest.mark.parametrize("name", ["weighed", "cbn-naive", "accumulated", "renorm"])
def test_one_value_over_all_ranks(name: str) -> None:
    x, out, grad, running = on_ranks(2, one_value, name)[0]
    torch.testing.assert_close(out, (x - 2) / (4 + 1e-5) ** 0.5, **ORACLE)
    assert torch.isfinite(grad).all()
    assert (running == 2).all() or name == "cbn-naive"  # CBN's total variance takes one value too


def looking_at_five(rank: int, world: int, moves: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of four steps, each rank at positions of its own, running statistics, the last dL/dW, and W."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-12)).double()
    ab.convert_(net, ab.CBN(window=3, positions=5, sync=True), example_inputs=torch.randn(2, 3, 9, 8).double())
    g = torch.Generator().manual_seed(2)
    outs = []
    for sizes in SIZES[2]:
        x, cotangent = (torch.randn(sum(sizes), *of, generator=g).double() for of in ((3, 9, 8), (6, 7, 6)))
        if world > 1:
            x, cotangent = x.split(list(sizes))[rank], cotangent.split(list(sizes))[rank]
        out = net(x)
        (grad,) = torch.autograd.grad(out, net[0].weight, cotangent)
        outs.append(out.detach())
        weight = net[0].weight.detach().clone()
        if moves:
            with torch.no_grad():
                net[0].weight += 0.02 * torch.randn(weight.shape, generator=g).double()
    return [*outs, net[1].running_mean, net[1].running_var], grad, weight


def test_whatever_positions_the_ranks_look_at() -> None:
    """Still weights: the moments are the whole batch's. At any, the gradients together are blind to their scale."""
    alone = looking_at_five(0, 1, False)[0]
    for a, b in zip(joined([seen for seen, *_ in on_ranks(2, looking_at_five, False)], alone), alone, strict=True):
        torch.testing.assert_close(a, b, **ORACLE)
    (_, one, weight), (_, two, _) = on_ranks(2, looking_at_five, True)
    along, size = ((one + two) * weight).sum((1, 2, 3)), one.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1)
    assert (along.abs() <= 1e-8 * size).all()
    assert ((one * weight).sum((1, 2, 3)).abs() > 1e-3 * size).any()
