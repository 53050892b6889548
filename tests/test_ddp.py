"""Every method under DistributedDataParallel, beside what that does done by hand, and ``sync`` beside one process."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import anybatch as ab

from .lives import assert_same, batch, random_like, training_state
from .ranks import on_ranks, torchrun
from .test_contract import Net
from .test_sync import SIZES, SYNCED, batches, build, joined
from .tolerances import ORACLE, REORDERED

CONFIGS = {name: method.small for name, method in ab.METHODS.items()}
CONFIGS |= {"bgn": ab.BGN(groups=4), "cbn-sync": ab.CBN(sync=True), "weighed-sync": ab.ExampleWeighedBN(sync=True)}
CONFIGS |= {"cbn-ring": ab.CBN(kind="ring"), "cbn-ring-sync": ab.CBN(kind="ring", sync=True)}
# The positions that a rank looks at are its own.
CONFIGS |= {"cbn-all": ab.CBN(positions=None), "cbn-all-sync": ab.CBN(positions=None, sync=True)}
every_config = pytest.mark.parametrize("name", CONFIGS)
STEPS = 3
D = torch.float64


class Branches(nn.Module):
    """Two branches, of which the second need not be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.a(x) + self.b(x) if both else self.a(x)


class Single(nn.Module):
    """One of each is quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x))


class ByHand:
    """What DistributedDataParallel does: rank 0's buffers before a forward, the mean of the ranks' gradients after."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.syncs, self.averages = net, True, True

    def __call__(self, *args: Any) -> Tensor:
        if self.syncs:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        self.syncs = self.averages  # where no gradients are averaged, the next forward gets no buffers
        return self.net(*args)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.averages = False
        yield
        self.averages = True

    def average(self) -> None:
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / dist.get_world_size()
            dist.all_reduce(p.grad)


Model = DistributedDataParallel | ByHand
Step = Callable[[Model, nn.Module, int], None]  # the model, what it wraps, a number for this rank's batch


def plain(model: Model, net: nn.Module, key: int) -> None:
    out = model(batch(key, D))
    out.backward(random_like(out, key))


def two_forwards(model: Model, net: nn.Module, key: int) -> None:
    outs = [model(batch(key + i, D)) for i in (0, 1)]
    torch.autograd.backward(outs, [random_like(out, key + i) for i, out in enumerate(outs)])


def two_forwards_frozen(model: Model, net: nn.Module, key: int) -> None:
    """The first norm in evaluation mode in a network in training."""
    net.bn1.eval()
    two_forwards(model, net, key)


def two_forwards_in_evaluation(model: Model, net: nn.Module, key: int) -> None:
    net.train(key < 100)
    two_forwards(model, net, key)
    net.train()


def accumulated(model: Model, net: nn.Module, key: int) -> None:
    with model.no_sync():
        for i in range(2):
            plain(model, net, key + i)
    plain(model, net, key + 2)


def evaluated_on_one_rank(model: Model, net: nn.Module, key: int) -> None:
    plain(model, net, key)
    if dist.get_rank() == 0 and isinstance(model, DistributedDataParallel):
        net.eval()
        with torch.no_grad():
            net(batch(7, D))
        net.train()


def branch_not_taken(model: Model, net: nn.Module, key: int) -> None:
    """On rank 1 in the first two steps, on rank 0 in the last."""
    x = batch(key, D)
    out = model(x, (key < 200) == (dist.get_rank() == 0))
    out.backward(random_like(out, key))


def start(name: str, make: type[nn.Module] = Net, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    net = make().double()
    ab.convert_(net, CONFIGS[name], example_inputs=torch.randn(2, 3, 9, 7, dtype=D), **options)
    return net


def run(net: nn.Module, model: Model, step: Step, rank: int) -> dict[str, Any]:
    """All that training leaves: gradients, state, history."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    ab.attach(net, optimizer)
    for number in range(STEPS):
        optimizer.zero_grad()
        step(model, net, 100 * number + 10 * rank)
        if isinstance(model, ByHand):
            model.average()
        optimizer.step()
    return {"gradients": [p.grad.clone() for p in net.parameters()], **training_state(net)}


def beside(rank: int, world: int, name: str, step: Step, options: dict[str, Any]) -> dict[str, Any]:
    make = Branches if step is branch_not_taken else Net
    mine, theirs = start(name, make), start(name, make)
    got = run(mine, DistributedDataParallel(mine, **options), step, rank)
    wanted = run(theirs, ByHand(theirs), step, rank)
    if world == 2:  # with more, sums of the same numbers in another order
        assert_same(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, **ORACLE)
    return got


def check(world: int, name: str, step: Step, **options: Any) -> list[dict[str, Any]]:
    """Bit for bit what it is by hand, and the same weights on every rank."""
    ranks = on_ranks(world, beside, name, step, options)
    weights = [[ranked["state"][key] for key, _ in start(name).named_parameters()] for ranked in ranks if step is plain]
    for other in weights[1:]:
        assert_same(other, weights[0])
    return ranks


@every_config
def test_training(name: str) -> None:
    check(2, name, plain)


@pytest.mark.parametrize("name", ["cbn", "cbn-sync"])
def test_what_is_each_ranks_own(name: str) -> None:
    """The history, of which ``sync`` makes the moments common; the running statistics until the next forward."""
    first, second = check(2, name, plain)
    running = [ranked["state"]["bn1.running_mean"] for ranked in (first, second)]
    mine, theirs = (ranked["history"]["bn1"]["0"] for ranked in (first, second))
    assert not torch.equal(mine["patch"], theirs["patch"])
    assert torch.equal(mine["scalars"], theirs["scalars"]) == torch.equal(*running) == (name == "cbn-sync")


@pytest.mark.parametrize("name", ["cbn", "cbn-sync", "accumulated", "iebn-cbn"])
def test_four_ranks(name: str) -> None:
    check(4, name, plain)


@every_config
@pytest.mark.parametrize("step", [two_forwards, two_forwards_frozen, two_forwards_in_evaluation])
def test_two_forwards_before_one_backward(name: str, step: Step) -> None:
    """The buffers that come from rank 0 in between spoil nothing that the first backward needs."""
    check(2, name, step)


@every_config
def test_an_accumulation_without_sync(name: str) -> None:
    check(2, name, accumulated)


@every_config
def test_evaluation_on_one_rank(name: str) -> None:
    check(2, name, evaluated_on_one_rank)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("sync")])
def test_a_branch_that_one_rank_does_not_take(name: str) -> None:
    check(2, name, branch_not_taken, find_unused_parameters=True)


@pytest.mark.parametrize("name", ["cbn", "cbn-sync", "iebn-cbn", "proxynorm"])
def test_gradients_as_views_of_buckets(name: str) -> None:
    check(2, name, plain, gradient_as_bucket_view=True)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def checkpointed(rank: int, world: int, name: str, reentrant: bool) -> None:
    mine, theirs = start(name), start(name)
    model = DistributedDataParallel(Checkpointed(mine, reentrant), static_graph=True)

    def step(model: Model, net: nn.Module, key: int) -> None:
        out = model(batch(key, D).requires_grad_())
        out.backward(random_like(out, key))

    assert_same(run(mine, model, step, rank), run(theirs, ByHand(theirs), step, rank))


# torch's own takes a batch in twice.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bn"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_static_graph_with_checkpoints(name: str, reentrant: bool) -> None:
    """Bit for bit what it is without checkpoints."""
    on_ranks(2, checkpointed, name, reentrant)


def compiled(rank: int, world: int, name: str) -> None:
    warnings.simplefilter("default")  # of the compiler's own making
    mine, theirs = start(name, Single), start(name, Single)
    model = DistributedDataParallel(torch.compile(mine, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(run(mine, model, plain, rank), run(theirs, ByHand(theirs), plain, rank), **ORACLE)


@pytest.mark.parametrize("name", ["cbn-sync", "cbn-ring-sync"])
def test_compiled_in_one_graph(name: str) -> None:
    """The ranks' moments are exchanged within it, forward and backward."""
    on_ranks(2, compiled, name, limit=240)


def with_sync(rank: int, world: int, name: str, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of every step under a loss that is a mean over the whole batch, then weights and buffers.

    A rank's loss is the mean over its own batch where the batches are equal; else its sum, scaled to give the same.
    """
    net = build(SYNCED[name], dtype)
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    ab.attach(net, optimizer)
    seen = []
    for images, cotangents in batches(sizes, dtype):
        optimizer.zero_grad()
        x, cotangent = (images[rank], cotangents[rank]) if world > 1 else (torch.cat(images), torch.cat(cotangents))
        out = model(x.requires_grad_())
        out.backward(cotangent * world / sum(map(len, images)))
        seen += [out.detach(), x.grad / world, *(p.grad.clone() for p in net.parameters())]
        optimizer.step()
    return [*seen, *(t.detach() for t in net.state_dict().values())]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", SYNCED)
def test_sync_is_one_process_with_the_whole_batch(name: str, world: int) -> None:
    """Unequal and empty batches, moving weights, float64."""
    args = name, SIZES[world], D
    alone = with_sync(0, 1, *args)
    scale = max(t.abs().max() for t in alone)  # a bias before a norm has a gradient of nothing but rounding
    for a, b in zip(joined(on_ranks(world, with_sync, *args), alone), alone, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **ORACLE)


@pytest.mark.parametrize("name", SYNCED)
def test_sync_with_equal_batches_in_float32(name: str) -> None:
    """To 1e-5 of the largest value, or as far as one process is off float64 itself."""
    args = name, [(2, 2)] * STEPS
    exact, alone = with_sync(0, 1, *args, D), with_sync(0, 1, *args, torch.float32)
    scale = max(t.abs().max() for t in alone)
    off = 4 * max(float((b - c).abs().max() / scale) for b, c in zip(alone, exact, strict=True))
    for a, b in zip(joined(on_ranks(2, with_sync, *args, torch.float32), alone), alone, strict=True):
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=max(REORDERED["atol"], off))


def in_pairs(rank: int, world: int, name: str) -> dict[str, Any]:
    """Moments pooled over two ranks of four, gradients averaged over all."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = start(name, process_group=pairs[rank // 2])
    return run(net, DistributedDataParallel(net), plain, rank)


def of_pairs(rank: int, world: int, name: str) -> dict[str, Any]:
    """Two processes, each with the batches of a pair; their gradients are sums over two ranks."""
    net = start(name)

    def step(model: Model, net: nn.Module, key: int) -> None:
        parts = [batch(100 * (key // 100) + 10 * (2 * rank + i), D) for i in (0, 1)]
        out = model(torch.cat(parts))
        outs = out.split([len(part) for part in parts])
        cotangents = [random_like(o, 100 * (key // 100) + 10 * (2 * rank + i)) for i, o in enumerate(outs)]
        out.backward(torch.cat(cotangents) / 2)

    return run(net, ByHand(net), step, rank)


@pytest.mark.parametrize("name", ["cbn-all-sync", "cbn-ring-sync", "weighed-sync"])
def test_sync_over_pairs(name: str) -> None:
    pairs, apart = on_ranks(4, in_pairs, name), on_ranks(2, of_pairs, name.removesuffix("-sync"))
    for rank, got in enumerate(pairs):
        for what in ("gradients", "state"):
            torch.testing.assert_close(got[what], apart[rank // 2][what], **ORACLE)


SCRIPT = """
import torch.distributed as dist
from tests.test_ddp import beside, plain

dist.init_process_group("gloo")
for name in ("cbn", "cbn-sync"):
    beside(dist.get_rank(), dist.get_world_size(), name, plain, {})
dist.destroy_process_group()
print("as by hand")
"""


def test_torchrun() -> None:
    assert torchrun(2, SCRIPT).count("as by hand") == 2
