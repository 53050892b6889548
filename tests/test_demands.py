"""What users of other libraries ask for, where no other test shows it, and the page that answers them."""

import ast
import copy
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import anybatch as ab

from .lives import assert_same, batch, random_like, started, steps, training_state
from .ranks import on_ranks
from .test_contract import C, Net, every_method, example
from .tolerances import ORACLE, REORDERED, SAME

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "demands.md").read_text()
D = torch.float64
NO_STATISTICS = {"gn", "proxynorm", "proxynorm-group", "nonorm"}


# A batch of one


class Pooled(nn.Module):
    """A norm on feature maps, one after global pooling, as a segmenter's image-level branch, and one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.squeeze, self.pooled = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.fc, self.vector = nn.Linear(C, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = self.pooled(self.squeeze(x.mean((2, 3), keepdim=True))).relu()
        return self.vector(self.fc(x.flatten(1)))


def epoch(net: nn.Module, images: Tensor) -> None:
    """Batches of two, the last one as it comes."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    ab.attach(net, optimizer)
    for x in DataLoader(images, batch_size=2, drop_last=False):
        optimizer.zero_grad()
        out = net(x)
        out.backward(torch.randn_like(out))
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()


@every_method
@pytest.mark.parametrize("examples", [1, 5])
def test_one_example_left_over(name: str, examples: int) -> None:
    """It trains, be it the first batch of all or the last, by what it is; and evaluation stays one example's own."""
    net = Pooled()
    ab.convert_(net, ab.METHODS[name].small, example_inputs=example(2))
    if name == "bn":  # torch's own
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            epoch(net, example(examples))
        return
    epoch(net, example(examples))
    assert all(t.isfinite().all() for t in net.state_dict().values())
    x = example(4)
    twins = copy.deepcopy(net), copy.deepcopy(net)
    one, other = (twin.vector(twin.fc(10 * torch.randn(1, C))) for twin in twins)
    assert (one - other).abs().max() > 0.01  # by its own moments it would be beta, whatever it is
    torch.testing.assert_close(net.eval()(x)[3:], net(x[3:]), **REORDERED)


# Running statistics


@every_method
def test_a_forward_that_leaves_no_trace(name: str) -> None:
    """For a perturbed batch (SAM, VAT): the outputs of training, while statistics and history stay as they are."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 4)
    before, norms = training_state(net), [net.bn1, net.bn2]
    twin = copy.deepcopy(net)
    ab.load_history_state_dict(twin, ab.history_state_dict(net))

    history = ab.history_state_dict(net)
    for norm in norms:
        norm.track_running_stats = False
    out, wanted = net(batch(4)), twin(batch(4))
    out.backward(random_like(out, 4))
    for norm in norms:
        norm.track_running_stats = True
    ab.load_history_state_dict(net, history)

    assert_same(out, wanted)
    assert_same(training_state(net), before)
    if name not in NO_STATISTICS:
        assert not torch.equal(twin.bn1.running_mean, net.bn1.running_mean)


@every_method
@pytest.mark.parametrize("frozen", [False, True])
def test_buffers_written_between_two_forwards(name: str, frozen: bool) -> None:
    """As DistributedDataParallel writes them before every forward, with one backward after both."""
    net, _ = started(name)
    net(batch(0))
    for norm in (net.bn1, net.bn2):
        norm.train(not frozen)
    outs = []
    for step in (1, 2):
        with torch.no_grad():
            for buffer in net.buffers():
                buffer.copy_(buffer.clone())
        outs.append(net(batch(step)))
    cotangents = [random_like(out, 1) for out in outs]
    if name == "bn":  # torch's own
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(outs, cotangents)
        return
    torch.autograd.backward(outs, cotangents)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@every_method
def test_buffers_are_updated_in_place(name: str) -> None:
    """What holds on to a buffer (DistributedDataParallel, an average) goes on seeing it; bgn's first batch apart."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 1)
    before = dict(net.named_buffers())
    values = {key: buffer.clone() for key, buffer in before.items()}
    steps(net, optimizer, 1, 3)
    if name not in NO_STATISTICS:
        assert not torch.equal(before["bn1.running_mean"], values["bn1.running_mean"])
        ab.recalibrate_(net, [example(), example()])
    assert all(buffer is before[key] for key, buffer in net.named_buffers())


# Optimizers and other norms


@every_method
def test_an_optimizer_that_groups_by_type_goes_on(name: str) -> None:
    """Built before the conversion: its groups then hold every parameter once, and a step moves them all."""
    net = Net()
    is_norm = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups = [
        {"params": [p for p in net.parameters() if id(p) in is_norm], "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if id(p) not in is_norm], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    ab.convert_(net, ab.METHODS[name].small, example_inputs=example(), optimizer=optimizer)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held[0] == {id(p) for norm in (net.bn1, net.bn2) for p in norm.parameters()}
    assert held[1] == {id(p) for conv in (net.conv1, net.conv2) for p in conv.parameters()}
    before = copy.deepcopy(dict(net.named_parameters()))
    out = net(example())
    out.backward(torch.randn_like(out))
    optimizer.step()
    unmoved = [key for key, p in net.named_parameters() if torch.equal(p, before[key])]
    assert not [key for key in unmoved if net.get_parameter(key).grad.any()]


def test_group_norm_in_a_pretrained_encoder() -> None:
    """All norms at once, nested ones too, with the weights that were learned; the report names each."""
    encoder = nn.Sequential(Net(), nn.ModuleDict({"deep": nn.ModuleList([nn.BatchNorm2d(C)])}))
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_()
    pretrained = copy.deepcopy(encoder.state_dict())
    report = ab.convert_(encoder, ab.GN(groups=4))
    assert [row.name for row in report.converted] == ["0.bn1", "0.bn2", "1.deep.0"]
    assert_same(encoder.state_dict(), {k: v for k, v in pretrained.items() if k in dict(encoder.named_parameters())})
    y = torch.randn(1, C, 5, 4)
    wanted = nn.functional.group_norm(y, 4, pretrained["1.deep.0.weight"], pretrained["1.deep.0.bias"], 1e-5)
    torch.testing.assert_close(encoder[1]["deep"][0](y), wanted, **SAME)


class Operations(TorchDispatchMode):
    """Counts what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [ab.GhostBN(examples_per_group=3), ab.BatchGroupNorm(4, 3)], ids=["ghost", "group"])
def test_ghosts_are_no_loop(config: Any) -> None:
    """As many operations for a hundred ghosts as for ten, and for a last batch that they do not divide."""
    counts = []
    for examples in (28, 30, 298, 300):
        layer, x = config.build(nn.BatchNorm2d(C)), torch.randn(examples, C, 3, 2, requires_grad=True)
        with Operations() as operations:
            out = layer(x)
            out.backward(torch.ones_like(out))
        counts.append(operations.count)
    assert counts[0] == counts[2]
    assert counts[1] == counts[3]


# Several devices without a GPU


def synced(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(rank)
    layer = ab.ExampleWeighedBN(alpha=0.0, sync=True).build(nn.BatchNorm2d(C, dtype=D))
    x = torch.randn(2 + rank, C, 4, 3, dtype=D, requires_grad=True)
    out = layer(x)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    buffers = [layer.running_mean, layer.running_var]
    return [t.detach() for t in (x, cotangent, out, x.grad, *buffers, layer.eval()(x))]


def test_synchronised_batchnorm_on_the_cpu() -> None:
    """Two processes are torch's BatchNorm on one, in training and in evaluation."""
    ranks = on_ranks(2, synced)
    xs, cotangents, outs, grads = (torch.cat(parts) for parts in list(zip(*ranks, strict=True))[:4])
    bn = nn.BatchNorm2d(C, dtype=D)
    x = xs.requires_grad_()
    out = bn(x)
    out.backward(cotangents)
    torch.testing.assert_close([outs, grads], [out.detach(), x.grad], **ORACLE)
    evaluated = bn.eval()(x).detach()
    for _, _, _, _, mean, var, _ in ranks:
        torch.testing.assert_close([mean, var], [bn.running_mean, bn.running_var], **ORACLE)
    torch.testing.assert_close(torch.cat([rank[-1] for rank in ranks]), evaluated, **ORACLE)


def accumulated(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(rank)
    layer = ab.AccumulatedBN(sync=True).build(nn.BatchNorm2d(C, dtype=D))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ab.attach(layer, optimizer)
    xs = [torch.randn(n, C, 4, 3, dtype=D) * n + rank for n in (2, 1 + rank, 3)]
    for x in xs:
        out = layer(x)
    return [torch.cat(xs), out.detach(), layer.running_mean, layer.running_var]


def test_accumulated_over_micro_batches_and_ranks() -> None:
    """The last micro-batch is normalised by the moments of all micro-batches of all ranks; so are the statistics."""
    ranks = on_ranks(2, accumulated)
    bn = nn.BatchNorm2d(C, dtype=D)
    whole = bn(torch.cat([rank[0] for rank in ranks])).split([len(rank[0]) for rank in ranks])
    for (_, out, mean, var), wanted in zip(ranks, whole, strict=True):
        torch.testing.assert_close(out, wanted[-3:].detach(), **ORACLE)
        torch.testing.assert_close([mean, var], [bn.running_mean, bn.running_var], **ORACLE)


def compiled(rank: int, world: int) -> list[list[Tensor]]:
    runs = []
    for compiling in (False, True):
        torch.manual_seed(rank)
        net = nn.Sequential(nn.Conv2d(3, C, 3, dtype=D), nn.BatchNorm2d(C, dtype=D), nn.ReLU())
        ab.convert_(net, ab.ExampleWeighedBN(alpha=0.0, sync=True))
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # the compiler's own
            out = (torch.compile(net, backend="aot_eager", fullgraph=True) if compiling else net)(example(2, D))
            out.backward(torch.randn_like(out))
        runs.append([out.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())])
    return runs


def test_synchronised_batchnorm_in_one_graph() -> None:
    for eager, graph in on_ranks(2, compiled):
        torch.testing.assert_close(graph, eager, **ORACLE)


# Export


@every_method
@pytest.mark.filterwarnings("default")  # the tracer's own
def test_exports(name: str) -> None:
    """By torch.export, for any number of examples; folded where it folds, and then no norm is left in the graph."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 2)
    net.eval()
    foldable = ab.METHODS[name].foldable
    models = [net, ab.fold(net, example_inputs=example())] if foldable else [net]
    x = example(5)
    with torch.no_grad():
        wanted = net(x)
        for model in models:
            sizes = ({0: torch.export.Dim("n")},)
            graph = torch.export.export(model, (example(3),), dynamic_shapes=sizes, strict=not foldable)
            torch.testing.assert_close(graph.module()(x), wanted, **REORDERED)
    assert not foldable or not [node for node in graph.graph.nodes if "norm" in str(node.target)]


# The page

ROWS = re.findall(r"^\| (\d+) \|.*\| (yes|in part|no|not ours) \|.*\|$", PAGE, re.MULTILINE)
REFERENCES = sorted(set(re.findall(r"`tests/(\w+\.py::\w+)`", PAGE)))


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_the_page_names_exists(reference: str) -> None:
    file, name = reference.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_counts_its_rows() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 44))
    counts = Counter(status for _, status in ROWS)
    said = "{yes} are met, {in part} in part, {no} are not, {not ours} is not a library's matter"
    assert said.format(**counts) in " ".join(PAGE.split())
    assert len(REFERENCES) > 43
