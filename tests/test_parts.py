"""A batch as so many examples at a time, all parts at once: what training on each of them by itself gives."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import anybatch as ab
from anybatch.layers import parts
from anybatch.nn import CrossIterationBatchNorm

from .test_cbn import D, channels_of, every_map, make
from .tolerances import ORACLE

OPTIONS = [
    {},
    {"refresh": 1},
    {"refresh": 3},
    {"positions": 4},
    {"positions": None},
    {"expansion": "second_moment"},
    {"gradient": "current"},
    {"window": 4},
    {"window_examples": 3},
    {"pooling": "equal"},
    {"average_reductions": 0},
    {"average_reductions": 5},
    {"momentum": None},
    {"momentum": 0.0},
    {"running": "torch"},
    {"momentum_batch": None},
    {"compensate": False},
    {"burn_in_steps": 3},
    {"burn_in_steps": 11, "compensate": False},
    {"burn_in_steps": 10, "expansion": "second_moment"},
    {"affine": False},
    {"track_running_stats": False},
    {"kind": "ring"},
]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether a batch's parts went at once, whenever that was tried."""
    went: list[bool] = []
    together = parts._together

    def noted(*args: Any) -> Any:
        out = together(*args)
        went.append(out is not None)
        return out

    monkeypatch.setattr(parts, "_together", noted)
    return went


def pair(map_kind: str, per_part: int, **options: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    """A map and its norm, which takes batches in parts; their copies that take them as they are; an input's shape."""
    module, shape = make(map_kind)
    other, c = copy.deepcopy(module), channels_of(module)
    torch.manual_seed(1)
    grouped = CrossIterationBatchNorm(c, examples_per_group=per_part, dtype=D, **options).follows(module)
    plain = CrossIterationBatchNorm(c, dtype=D, **options).follows(other)
    for p, q in zip(grouped.parameters(), plain.parameters(), strict=True):
        with torch.no_grad():
            q.copy_(p.normal_())
    return [module, grouped, other, plain], shape


def same_steps(nets: list[nn.Module], shape: tuple[int, ...], examples: int, per_part: int, steps: int = 4) -> None:
    """Outputs, every gradient, running statistics and history, while the weights move."""
    module, grouped, other, plain = nets
    for step in range(steps):
        x = torch.randn(examples, *shape, dtype=D) + 0.5
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = grouped(module(mine))
        g = torch.randn_like(out)
        out.backward(g)
        for i in range(0, examples, per_part):
            part = plain(other(theirs[i : i + per_part]))
            torch.testing.assert_close(out[i : i + per_part], part, **ORACLE)
            part.backward(g[i : i + per_part])
        torch.testing.assert_close(mine.grad, theirs.grad, **ORACLE)
        ours = [*module.parameters(), *grouped.parameters()]
        for p, q in zip(ours, [*other.parameters(), *plain.parameters()], strict=True):
            torch.testing.assert_close(p.grad, q.grad, **ORACLE, msg=lambda m, step=step: f"step {step}: {m}")
            with torch.no_grad():
                q.copy_(p.sub_(0.02 * p.grad))
            p.grad = q.grad = None
        for a, b in zip(grouped.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, **ORACLE)
    for index, history in grouped.histories.items():
        for key, value in history.state_dict().items():
            torch.testing.assert_close(value, plain.histories[index].state_dict()[key], **ORACLE)


@every_map
@pytest.mark.parametrize("per_part", [1, 2, 4])
def test_parts_are_batches_one_after_another(kind: str, per_part: int, at_once: list[bool]) -> None:
    """The default layer, reductions in their order included."""
    per_part += kind == "linear"  # one value is a case of its own
    nets, shape = pair(kind, per_part)
    same_steps(nets, shape, 4 * per_part, per_part)
    assert at_once == [True] * 4


@pytest.mark.parametrize("per_part", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_every_option(options: dict[str, Any], per_part: int, at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", per_part, **options)
    apart = {"positions": None, "kind": "ring"}.items() & options.items()
    if apart and options.get("average_reductions") != 0:  # then the backward meets the parts from last to first
        nets, shape = pair("conv2d reflect", per_part, **options, average_reductions=0)
    same_steps(nets, shape, 8, per_part)
    assert at_once == ([] if apart else [True] * 4)


def test_stored_in_bfloat16(at_once: list[bool]) -> None:
    """It is rounded once and not after every part, and so a little off."""
    nets, shape = pair("conv2d reflect", 2, storage="bfloat16")
    module, grouped, other, plain = nets
    for _ in range(3):
        x = torch.randn(8, *shape, dtype=D)
        out = grouped(module(x))
        g = torch.randn_like(out)
        out.backward(g)
        for i in range(0, 8, 2):
            plain(other(x[i : i + 2])).backward(g[i : i + 2])
        with torch.no_grad():
            p, q = module.weight, other.weight
            torch.testing.assert_close(p.grad, q.grad, rtol=2**-6, atol=2**-6 * float(q.grad.abs().max()))
            for p, q in zip(module.parameters(), other.parameters(), strict=True):
                q.copy_(p.sub_(0.02 * p.grad))
                p.grad = q.grad = None
    assert grouped.histories[0].covariance.dtype == torch.bfloat16
    assert at_once == [True] * 3


def test_what_is_over_is_a_part_too(at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", 3, average_reductions=0)
    same_steps(nets, shape, 8, 3)
    assert at_once == [True] * 4


def test_a_part_of_one_value_waits_for_more(at_once: list[bool]) -> None:
    nets, shape = pair("linear", 1, average_reductions=0)
    same_steps(nets, shape, 8, 1)
    assert at_once == []


def test_a_part_that_is_not_finite_leaves_no_trace(at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", 2, average_reductions=0)
    module, grouped, other, plain = nets
    same_steps(nets, shape, 8, 2)
    x = torch.randn(8, *shape, dtype=D)
    x[2] = torch.inf
    out = grouped(module(x))
    for i in range(0, 8, 2):
        torch.testing.assert_close(out[i : i + 2], plain(other(x[i : i + 2])), **ORACLE, equal_nan=True)
    assert at_once[-1] is False
    for a, b in zip(grouped.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)
    same_steps(nets, shape, 8, 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_under_a_checkpoint(reentrant: bool, broken: bool, at_once: list[bool]) -> None:
    """Thirty-two parts, more than a checkpoint can repeat one by one; broken: they go one by one both times."""
    count = 8 if broken else 32
    nets, shape = pair("conv2d reflect", 1)
    other, plain = nets[2:]
    plain.examples_per_group = 1
    for _ in range(3):
        x = torch.randn(count, *shape, dtype=D)
        if broken:
            x[1] = torch.inf
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = checkpoint(lambda t: nets[1](nets[0](t)), mine, use_reentrant=reentrant)
        g = torch.randn_like(out)
        out.backward(g)
        plain(other(theirs)).backward(g)
        torch.testing.assert_close(mine.grad, theirs.grad, **ORACLE, equal_nan=True)
    for a, b in zip(nets[1].buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)
    assert at_once.count(not broken) == len(at_once)


def test_a_graph_that_waits_keeps_what_it_was_made_with() -> None:
    """Two forwards before their backwards give what each alone would."""
    nets, shape = pair("conv2d reflect", 2, average_reductions=0)
    module, grouped, other, plain = nets
    a, b = (torch.randn(8, *shape, dtype=D) for _ in range(2))
    first, second = grouped(module(a)), grouped(module(b))
    (first.sum() + second.square().sum()).backward()
    for x, loss in ((a, torch.sum), (b, lambda t: t.square().sum())):
        for i in range(0, 8, 2):
            loss(plain(other(x[i : i + 2]))).backward()
    torch.testing.assert_close(module.weight.grad, other.weight.grad, **ORACLE)


def test_parts_keep_the_memory_format(at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", 2)
    module, grouped, other, plain = nets
    for _ in range(2):
        x = torch.randn(8, *shape, dtype=D)
        out = grouped(module(x.to(memory_format=torch.channels_last)))
        assert out.is_contiguous(memory_format=torch.channels_last)
        g = torch.randn_like(out)
        out.backward(g)
        for i in range(0, 8, 2):
            plain(other(x[i : i + 2])).backward(g[i : i + 2])
    torch.testing.assert_close(module.weight.grad, other.weight.grad, **ORACLE)
    assert at_once == [True, True]


def test_no_part_may_be_looked_at(at_once: list[bool]) -> None:
    """Of every nine one is: of a batch of two parts often none."""
    nets, shape = pair("conv2d reflect", 2, refresh=9)
    same_steps(nets, shape, 4, 2, steps=8)
    assert at_once == [True] * 8


def test_an_outlier_is_soon_forgotten() -> None:
    """In float32, its rounding included: a part that is off by 10^4 leaves no trace in those long after it."""
    outs = []
    for dtype in (torch.float32, D):
        torch.manual_seed(3)
        conv = nn.Conv2d(3, 4, 3).to(dtype)
        norm = CrossIterationBatchNorm(4, window=2, examples_per_group=1, dtype=dtype).follows(conv)
        x = torch.randn(40, 3, 6, 6, dtype=D)
        x[0] += 1e4
        outs.append(norm(conv(x.to(dtype)))[20:])
    torch.testing.assert_close(outs[0].to(D), outs[1], rtol=0, atol=1e-5)


def test_sync_that_is_set_later_is_heard(monkeypatch: pytest.MonkeyPatch, at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", 2)
    monkeypatch.setattr(type(nets[1]), "group", "some")
    with pytest.raises(Exception, match=r"(?i)process group|invalid group|str"):
        nets[1](nets[0](torch.randn(8, *shape, dtype=D)))
    assert at_once == []


def test_nothing_is_counted_where_nothing_is_tracked() -> None:
    nets, shape = pair("conv2d reflect", 2)
    nets[1].track_running_stats = False
    nets[1](nets[0](torch.randn(8, *shape, dtype=D)))
    assert int(nets[1].num_batches_tracked) == 0


@pytest.mark.parametrize("per_part", [1, 2])
def test_what_comes_out_may_be_written_to(per_part: int) -> None:
    nets, shape = pair("conv2d reflect", per_part)
    scale = torch.ones((), dtype=D, requires_grad=True)
    with torch.no_grad():
        out = nets[1](nets[0](torch.randn(8, *shape, dtype=D)))
    out.mul_(scale).sum().backward()
    assert scale.grad is not None


def test_a_selective_checkpoint_takes_no_product_of_ours_for_its_own() -> None:
    """Of the matrix products that it keeps, those that only a first run makes are none."""
    nets, shape = pair("conv2d reflect", 2)
    w = torch.randn(5, nets[1](nets[0](torch.zeros(2, *shape, dtype=D))).flatten(1).shape[1], dtype=D)
    x = torch.randn(8, *shape, dtype=D, requires_grad=True)

    def forward(t: torch.Tensor) -> torch.Tensor:
        return (nets[1](nets[0](t)).flatten(1) @ w.t()).square()

    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    state = ab.history_state_dict(nets[1])
    grads = []
    for context in ({}, {"use_reentrant": False, "context_fn": keep}):
        ab.load_history_state_dict(nets[1], state)
        out = checkpoint(forward, x, **context) if context else forward(x)
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*grads, **ORACLE)


def test_scaled_losses_leave_the_averages_as_they_were(at_once: list[bool]) -> None:
    nets, shape = pair("conv2d reflect", 2)
    module, grouped, other, plain = nets
    grouped.scaled_by(torch.tensor(8.0))
    for _ in range(2):
        x = torch.randn(8, *shape, dtype=D)
        out = grouped(module(x))
        g = torch.randn_like(out)
        out.backward(8 * g)
        for i in range(0, 8, 2):
            plain(other(x[i : i + 2])).backward(g[i : i + 2])
    torch.testing.assert_close(module.weight.grad, 8 * other.weight.grad, **ORACLE)
    torch.testing.assert_close(grouped.histories[0].reductions, plain.histories[0].reductions, **ORACLE)
    assert at_once == [True, True]


def test_a_model_trains_as_by_accumulation(at_once: list[bool]) -> None:
    """Norms one after another: 8 images at once, an image at a time, give the steps of 8 micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).double()
    other = copy.deepcopy(model)
    ab.convert_(model, ab.CBN(examples_per_group=1), example_inputs=torch.randn(2, 3, 8, 7, dtype=D))
    ab.convert_(other, ab.CBN(), example_inputs=torch.randn(2, 3, 8, 7, dtype=D))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, other)]
    for _ in range(4):
        x = torch.randn(8, 3, 8, 7, dtype=D)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x)[:, 0].square().mean().backward()
        for part in x.split(1):
            (other(part)[:, 0].square().mean() / 8).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **ORACLE)
    assert at_once == [True] * 8
