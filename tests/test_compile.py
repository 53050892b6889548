"""torch.compile with fullgraph=True: no break, no graph after the second step, what eager training gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.lab.networks import small_resnet

from .selection import usually
from .small_models import ConvNorm, SharedHead, SharedNorm
from .test_contract import every_method
from .tolerances import REORDERED

# The compiler reads .grad of tensors that are no leaves, and says so.
pytestmark = pytest.mark.filterwarnings("default")
SIZES = [(12, 10), (12, 10), (15, 17), (20, 11), (9, 14)]
Compile = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(net: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(net, fullgraph=True, backend=backend, **options)


def net_of(name: str, make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(1)
    net = make()
    ab.convert_(net, ab.METHODS[name].small, example_inputs=x)
    return net


def batches(sizes: list[tuple[int, int]], channels: int = 3, n: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(n, channels, *size, generator=g) for size in sizes]


def train(net: nn.Module, run: Any, images: list[Tensor], micro_batches: int = 1) -> tuple[list[Tensor], list[int]]:
    """Outputs, gradients, final state and history; and the graphs there were after every step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.002)
    ab.attach(net, optimizer)
    seen, graphs = [], []
    for step, x in enumerate(images):
        g = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for part in x.chunk(micro_batches):
            out = run(part)
            parts = out if isinstance(out, (list, tuple)) else [out]
            torch.autograd.backward(parts, [torch.randn(p.shape, generator=g) for p in parts])
            seen += [p.detach().clone() for p in parts]
        seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    seen += [t.clone() for t in net.state_dict().values()]
    for layer in ab.history_state_dict(net)["layers"].values():
        for history in layer.values():
            # A slot without weight may hold what it held before.
            counts = history["count"] > 0 if "slot" in history else slice(None)
            seen += [history["count"], history["scalars"][..., counts], history["covariance"][:, counts]]
            seen += [history["reductions"], history["forwards"]]
    return seen, graphs


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    scale = max(float(t.abs().max()) for t in a if t.numel())
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.float() / scale, y.float() / scale, **REORDERED)


def assert_same_compiled(
    name: str, make: Callable[[], nn.Module], images: list[Tensor], micro_batches: int = 1, **options: Any
) -> list[int]:
    """Trains eagerly and compiled to the same, and gives the graphs there were after every step of the latter."""
    results = []
    for compiling in (False, True):
        net = net_of(name, make, images[0])
        results.append(train(net, compiled(net, **options) if compiling else net, images, micro_batches))
    same(results[1][0], results[0][0])
    return results[1][1]


class Checkpointed(nn.Module):
    """Two blocks, each under a checkpoint unless ``plain``; the second is called ``levels`` times."""

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.levels, self.plain = levels, True

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def second(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.plain else checkpoint(self.first, x, use_reentrant=False)
        for _ in range(self.levels):
            x = x + (self.second(x) if self.plain else checkpoint(self.second, x, use_reentrant=False))
        return x


def resnet() -> nn.Module:
    return small_resnet(4, in_channels=3, widths=(4, 8))


@every_method
def test_training_and_evaluation_between_its_steps(name: str) -> None:
    """Each in one graph; the first step of all is a compiled one."""
    images = batches([(12, 10)] * 4)
    results = []
    for compiling in (False, True):
        net = net_of(name, Checkpointed, images[0])
        run = compiled(net) if compiling else net
        seen, graphs = train(net, run, images[:2])
        net.eval()
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(run(images[2]), net(images[2]), **REORDERED)
        evaluated = counters["stats"]["unique_graphs"]
        more, later = train(net.train(), run, images[2:])
        results.append(seen + more)
    same(results[1], results[0])
    assert graphs[1] == (2 if name == "bgn" else 1)  # bgn's first batch settles its groups
    assert [evaluated, *later] == [graphs[1] + 1] * 3
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("name", "make"),
    usually(
        [("cbn", Checkpointed), ("renorm", Checkpointed)],
        [("cbn", resnet), *((name, Checkpointed) for name in ("bn", "weighed", "cbn", "renorm", "iebn", "proxynorm"))],
    ),
)
def test_training_on_changing_sizes(name: str, make: Callable[[], nn.Module]) -> None:
    """With dynamic=True, in one graph."""
    graphs = assert_same_compiled(name, make, batches(SIZES), dynamic=True)
    assert graphs[1:] == [1] * (len(SIZES) - 1)
    assert not counters["graph_break"]


MODELS = {
    "shared head": (lambda: SharedHead(per_level=False), 3),
    "a norm a level": (lambda: SharedHead(per_level=True), 3),
    "shared norm": (SharedNorm, 3),
    "norm inside its map": (lambda: nn.Sequential(ConvNorm(3, 4, 3, norm=nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1)), 3),
    "parametrized map": (lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), 3),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)), 4),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)), 3),
    "dilated same": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4)), 3),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 120, 5), nn.BatchNorm1d(5)), 3),
    "sum before the norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), 3),
}


@pytest.mark.parametrize(
    "model", usually(("shared head", "a norm a level", "norm inside its map", "transposed", "linear"), MODELS)
)
def test_every_way_in_which_maps_and_norms_meet(model: str) -> None:
    make, channels = MODELS[model]
    assert assert_same_compiled("cbn", make, batches([(12, 10)] * 4, channels))[-1] <= 2


@pytest.mark.parametrize("name", usually(("cbn", "accumulated"), ["cbn", "accumulated", "renorm", "weighed"]))
def test_accumulation(name: str) -> None:
    graphs = assert_same_compiled(name, Checkpointed, batches([(12, 10)] * 4, n=6), micro_batches=3)
    assert len(set(graphs[1:])) == 1


@pytest.mark.parametrize(
    "name", usually(("cbn", "renorm"), ["cbn", "accumulated", "renorm", "bgn", "iebn", "proxynorm"])
)
def test_autocast(name: str) -> None:
    """bfloat16 under autocast, near eager's; what is kept is float32 either way."""
    images = batches([(12, 10)] * 3)
    results = []
    for compiling in (False, True):
        net = net_of(name, Checkpointed, images[0])
        run = compiled(net) if compiling else net

        def forward(x: Tensor, run: Any = run) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x).float()

        results.append(train(net, forward, images)[0])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert float((a.float() - b.float()).norm()) <= 0.05 * float(b.float().norm()) + 1e-3


# AccumulatedBN begins a batch in a forward, BGN may settle its groups there: refused, see below.
@pytest.mark.parametrize(
    "name",
    usually(
        ("cbn", "cbn-naive", "renorm", "iebn-cbn"), [name for name in ab.METHODS if name not in ("accumulated", "bgn")]
    ),
)
def test_a_checkpoint_inside(name: str) -> None:
    """What is computed again in the backward normalises by what the forward did, though the history has moved on."""
    images = batches([(12, 10)] * 4)
    results = []
    for compiling in (False, True):
        net = net_of(name, lambda: Checkpointed(levels=3), images[0])
        net.plain = not compiling
        results.append(train(net, compiled(net) if compiling else net, images)[0])
    same(results[1], results[0])


@pytest.mark.parametrize("name", ["accumulated", "bgn"])
def test_a_checkpoint_inside_is_refused_where_a_forward_sets_more_than_tensors(name: str) -> None:
    """By torch, with fullgraph=True; without, it runs such a checkpoint eagerly."""
    x = batches([(12, 10)])[0]
    net = net_of(name, Checkpointed, x)
    net.plain = False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Unsafe side effect"):
        compiled(net)(x)


@pytest.mark.parametrize(
    "name", usually(("iebn", "batch-group"), ["weighed", "iebn", "ghost", "batch-group", "proxynorm", "gn"])
)
def test_a_checkpoint_around_takes_a_batch_in_once(name: str) -> None:
    images = batches([(12, 10)] * 3)
    results = []
    for compiling in (False, True):
        net = net_of(name, Checkpointed, images[0])
        run = compiled(net) if compiling else net
        results.append(train(net, lambda x, run=run: checkpoint(run, x, use_reentrant=False), images)[0])
    same(results[1], results[0])


@pytest.mark.parametrize(
    "name",
    usually(("cbn", "accumulated"), ["cbn", "cbn-naive", "cbn-paper", "iebn-cbn", "renorm", "accumulated"]),
)
def test_a_checkpoint_around_what_moves_on_is_refused(name: str) -> None:
    x = batches([(12, 10)])[0]
    net = net_of(name, Checkpointed, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ab.attach(net, optimizer)
    out = checkpoint(compiled(net), x, use_reentrant=False)
    with pytest.raises(ab.AnybatchError, match="compile the checkpoint with it"):
        out.backward(torch.randn_like(out))


@pytest.mark.parametrize("name", ["cbn"])
def test_eager_steps_compiled_steps_and_a_load_have_one_history(name: str) -> None:
    images = batches([(12, 10)] * 6)
    straight = net_of(name, Checkpointed, images[0])
    for some in (images[:2], images[2:4], images[4:]):
        wanted, _ = train(straight, straight, some)
    net = net_of(name, Checkpointed, images[0])
    train(net, net, images[:2])
    train(net, compiled(net), images[2:4])
    resumed = net_of(name, Checkpointed, images[0])
    resumed.load_state_dict(net.state_dict())
    ab.load_history_state_dict(resumed, ab.history_state_dict(net))
    same(train(resumed, compiled(resumed), images[4:])[0], wanted)


@pytest.mark.parametrize("name", usually(("cbn", "renorm"), ["cbn", "cbn-naive", "cbn-paper", "accumulated", "renorm"]))
def test_in_float64(name: str) -> None:
    """Where a tensor of no dimension may pass for one of Python's numbers."""
    images = [x.double() for x in batches([(12, 10)] * 3)]
    results = []
    for compiling in (False, True):
        net = net_of(name, Checkpointed, images[0].float()).double()
        run = compiled(net) if compiling else net
        results.append(train(net, lambda x, run=run: run(x).float(), images)[0])
    same(*results)


@pytest.mark.parametrize("name", ["cbn"])
def test_inductor(name: str) -> None:
    """The compiler that users get, on a ResNet."""
    assert assert_same_compiled(name, Checkpointed, batches([(12, 10)] * 3), backend="inductor") == [1, 1, 1]
