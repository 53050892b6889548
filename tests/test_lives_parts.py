"""A model trained in part, or by other means than its own call: functional, evaluated in between, frozen, shared."""

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.layers.base import NormLayer

from .lives import assert_same, batch, optimizer_of, random_like, started, steps, training_state
from .test_contract import C, Net, converted, every_method, example
from .tolerances import ORACLE

D = torch.float64


# functional_call


@every_method
def test_functional_call(name: str) -> None:
    """Descent on parameters that are passed in is descent on the model's own, which get no gradient."""
    plain, net = converted(name, dtype=D), converted(name, dtype=D)
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    optimizer, signal = optimizer_of(plain), optimizer_of(net)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    given = {key: p.detach().clone().requires_grad_() for key, p in plain.named_parameters()}
    own = {key: p.detach().clone() for key, p in net.named_parameters()}
    for step in range(5):
        x, z = (batch(step, D).requires_grad_() for _ in range(2))
        out, wanted = torch.func.functional_call(net, given, (x,)), plain(z)
        torch.testing.assert_close(out, wanted, **ORACLE)
        grads = torch.autograd.grad(out, [x, *given.values()], random_like(out, step))
        optimizer.zero_grad()
        wanted.backward(random_like(wanted, step))
        torch.testing.assert_close(list(grads), [z.grad, *(p.grad for p in plain.parameters())], **ORACLE)
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        given = {
            key: (p - 0.02 * g).detach().requires_grad_() for (key, p), g in zip(given.items(), grads[1:], strict=True)
        }
        signal.step()  # of no gradient: it moves nothing, and says that a step was made
    assert_same({key: p.detach() for key, p in net.named_parameters()}, own)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()), **ORACLE)


@every_method
def test_functional_call_with_buffers(name: str) -> None:
    """Running statistics that are passed in move as a model's own would; the model's own stay."""
    plain, net = converted(name, dtype=D), converted(name, dtype=D)
    signals = [optimizer_of(each) for each in (plain, net)]
    given = {key: t.detach().clone() for key, t in plain.state_dict().items()}
    before = {key: t.clone() for key, t in net.named_buffers()}
    for step in range(3):
        for training in (True, False):
            plain.train(training)
            net.train(training)
            x = batch(step, D)
            torch.testing.assert_close(torch.func.functional_call(net, given, (x,)), plain(x), **ORACLE)
        for signal in signals:
            signal.step()
    assert_same(dict(net.named_buffers()), before)
    torch.testing.assert_close({key: given[key] for key in before}, dict(plain.named_buffers()), **ORACLE)


# Evaluation in between


@every_method
@pytest.mark.parametrize("graph", [True, False], ids=["with gradients", "without"])
def test_evaluation_in_mid_training_changes_nothing(name: str, graph: bool) -> None:
    """Between steps, between a forward and its backward and between micro-batches, bit for bit."""

    def run(evaluating: bool) -> tuple[list[Tensor], dict]:
        net, optimizer = started(name)
        outs = []

        def evaluate() -> None:
            if evaluating:
                before = training_state(net)
                net.eval()
                with torch.set_grad_enabled(graph):
                    x = example().requires_grad_(graph)
                    out = net(x)
                    if graph:
                        torch.autograd.grad(out, x, torch.ones_like(out))
                net.train()
                assert_same(training_state(net), before)

        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                evaluate()
                out = net(batch(2 * step + micro))
                evaluate()
                out.backward(random_like(out, step))
                outs.append(out.detach())
            evaluate()
            optimizer.step()
        return outs, training_state(net)

    assert_same(run(evaluating=True), run(evaluating=False))


# Frozen parts


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Net(), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def move(nets: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], step: int) -> None:
    """Parameters of all nets by the same random amounts, frozen ones too; the optimizers say that it was a step."""
    for net, optimizer in zip(nets, optimizers, strict=True):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.zero_grad()
        optimizer.step()


# What is frozen, and whether the input of the model gets a gradient.
FROZEN = {
    "gamma and beta": (["body.bn1.weight", "body.bn1.bias", "body.bn2.weight", "body.bn2.bias"], True),
    "one gamma": (["body.bn1.weight"], False),
    "the first map": (["body.conv1.weight"], False),
    "the first map, not its input": (["body.conv1.weight"], True),
    "every map": (["body.conv1.weight", "body.conv2.weight", "body.conv2.bias"], False),
    "all but the head": (["body."], False),
    "all but the head and the input": (["body."], True),
}


@every_method
@pytest.mark.parametrize("what", FROZEN)
def test_frozen_parameters(name: str, what: str) -> None:
    """The other gradients are those of a model with nothing frozen; the frozen ones get none."""
    whole, part = converted(name, WithHead(), D), converted(name, WithHead(), D)
    part.load_state_dict(whole.state_dict())
    optimizers = [optimizer_of(net) for net in (whole, part)]
    prefixes, input_too = FROZEN[what]
    frozen = [key for key, _ in part.named_parameters() if key.startswith(tuple(prefixes))]
    for key in frozen:
        part.get_parameter(key).requires_grad_(False)
    for step in range(4):
        xs = [batch(step, D).requires_grad_(input_too) for _ in range(2)]
        outs = [net(x) for net, x in zip((whole, part), xs, strict=True)]
        torch.testing.assert_close(outs[1], outs[0], **ORACLE)
        for out in outs:
            out.backward(random_like(out, step))
        for key, p in part.named_parameters():
            if key in frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, whole.get_parameter(key).grad, **ORACLE, msg=key)
        if input_too:
            torch.testing.assert_close(xs[1].grad, xs[0].grad, **ORACLE)
        move((whole, part), optimizers, step)
    states = [training_state(net) for net in (whole, part)]
    for histories in (histories for state in states for histories in state["history"].values()):
        for history in histories.values():  # what CBN averages of its backwards: none came by where all is frozen
            del history["reductions"], history["backwards"]
    torch.testing.assert_close(states[1], states[0], **ORACLE)


@every_method
def test_a_frozen_norm(name: str) -> None:
    """norm.eval() in a training model: its state stays, and gradients through it are those of torch's BatchNorm."""
    net, optimizer = started(name, D)
    steps(net, optimizer, 0, 3)
    net.bn1.eval()
    other = copy.deepcopy(net)
    ab.load_history_state_dict(other, ab.history_state_dict(net))
    if ab.METHODS[name].foldable and isinstance(other.bn1, NormLayer):
        other.bn1 = other.bn1.to_batchnorm().eval()
    before = training_state(net.bn1)
    grads = []
    for model in (net, other):
        x = batch(3, D).requires_grad_()
        out = model(x)
        model.zero_grad()
        out.backward(random_like(out, 3))
        grads.append([out, x.grad, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(grads[0], grads[1], **ORACLE)
    alone = net.bn1(net.conv1(batch(3, D)[:1])).relu()
    torch.testing.assert_close(net.bn1(net.conv1(batch(3, D))).relu()[:1], alone, **ORACLE)
    optimizer_of(net).step()
    after = training_state(net.bn1)
    for key, buffer in net.bn1.named_buffers():
        assert_same(buffer, before["state"][key])
    assert_same(after["history"], before["history"])
    net.train()
    assert all(torch.isfinite(out).all() for out in steps(net, optimizer_of(net), 4, 6))  # thawed again


# Shared heads


class Pyramid(nn.Module):
    """RetinaNet's head: one convolution and norm on five levels of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def levels(self, x: Tensor) -> list[Tensor]:
        return [F.adaptive_avg_pool2d(x, size) for size in ((16, 13), (8, 7), (4, 4), (3, 2), (2, 1))]

    def forward(self, x: Tensor) -> Tensor:
        heads = [self.norm(self.last(self.bn(self.conv(level)).relu())) for level in self.levels(x)]
        return torch.cat([head.flatten(2) for head in heads], 2)


def pyramid(config: ab.CBN | object, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Pyramid().to(dtype)
    report = ab.convert_(net, config, example_inputs=torch.randn(2, 3, 16, 13, dtype=dtype))
    assert len(report.converted) == 2 or isinstance(config, ab.BN)
    return net, optimizer_of(net)


def image(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 16, 13, generator=torch.Generator().manual_seed(step)).to(dtype).requires_grad_()


@every_method
def test_a_head_on_five_levels(name: str) -> None:
    """Outputs and gradients of three steps in float32 against the same in float64; five batches a step."""
    config = ab.METHODS[name].small
    nets = [pyramid(config, dtype) for dtype in (torch.float32, D)]
    for step in range(3):
        gradients = []
        for net, optimizer in nets:
            x = image(step, next(net.parameters()).dtype)
            out = net(x)
            optimizer.zero_grad()
            out.backward(random_like(out, step))
            gradients.append([out, x.grad, *(p.grad for p in net.parameters())])
        largest = max(float(b.detach().abs().max()) for b in gradients[1])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * largest)
        move([net for net, _ in nets], [optimizer for _, optimizer in nets], step)
        for net, _ in nets:
            for layer in (net.bn, net.norm):
                for history in getattr(layer, "histories", {}).values():
                    assert history.forwards == 5 * (step + 1)


@pytest.mark.parametrize("gradient", ["history", "current"])
def test_five_levels_as_written_out(gradient: str) -> None:
    """The ring in a step: each level by the moments of all so far, through today's weights or this one alone."""
    torch.manual_seed(3)
    head = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)).double()
    plain = copy.deepcopy(head)
    levels = [torch.randn(2, 3, h, w, dtype=D) * h for h, w in ((16, 13), (8, 7), (4, 4), (3, 2), (2, 1))]
    ab.convert_(head, ab.CBN(8, kind="ring", gradient=gradient, average_reductions=0), example_inputs=levels[0])
    cotangents = [torch.randn(2, 6, *x.shape[2:], dtype=D) for x in levels]
    outs = [head(x) for x in levels]
    torch.autograd.backward(outs, cotangents)
    conv, bn = plain
    rows: list[Tensor] = []  # (C, values) of each level so far
    for x, out, cotangent in zip(levels, outs, cotangents, strict=True):
        y = conv(x)
        seen = torch.cat([*rows, y.transpose(0, 1).flatten(1)], 1)
        var, mean = torch.var_mean(seen, 1, correction=0)
        wanted = (y - mean.view(1, -1, 1, 1)) / (var + bn.eps).sqrt().view(1, -1, 1, 1)
        wanted = wanted * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(out, wanted, **ORACLE)
        wanted.backward(cotangent)
        rows = [torch.cat([conv(level) for level in [x]]).transpose(0, 1).flatten(1) for x in levels[: len(rows) + 1]]
        if gradient == "current":
            rows = [row.detach() for row in rows]
    for (key, p), q in zip(head.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **ORACLE, msg=key)
    assert int((head[1].histories[0].count > 0).sum()) == 5


# Two optimizers


@every_method
def test_two_optimizers_for_parts_of_a_model(name: str) -> None:
    """SGD on two halves is SGD on all, bit for bit."""
    whole, optimizer = started(name)
    wanted = steps(whole, optimizer, 0, 5)
    net, _ = started(name)
    parts = [[*net.conv1.parameters(), *net.bn2.parameters()], [*net.conv2.parameters(), *net.bn1.parameters()]]
    optimizers = [torch.optim.SGD(part, lr=0.02, momentum=0.9) for part in parts]
    ab.attach(net, optimizers)
    for step, expected in enumerate(wanted):
        out = net(batch(step))
        assert_same(out.detach(), expected)
        for each in optimizers:
            each.zero_grad()
        out.backward(random_like(out, step))
        for each in optimizers:
            each.step()
    assert_same(training_state(net), training_state(whole))


@every_method
def test_two_optimizers_in_turn(name: str) -> None:
    """As a GAN's: each steps on its own forward, and all goes on finite with an entry a forward."""
    net, _ = started(name)
    optimizers = [
        torch.optim.Adam([*net.conv1.parameters(), *net.bn1.parameters()], lr=0.01),
        torch.optim.SGD([*net.conv2.parameters(), *net.bn2.parameters()], lr=0.01),
    ]
    ab.attach(net, optimizers)
    for step in range(6):
        out = net(batch(step))
        for each in optimizers:
            each.zero_grad()
        out.backward(random_like(out, step))
        optimizers[step % 2].step()
        assert torch.isfinite(out).all()
    for layer in (module for module in net.modules() if isinstance(module, NormLayer)):
        assert all(int(h.forwards) == 6 for h in getattr(layer, "histories", {}).values())
