"""Accumulated BatchNorm against its equations, and the laws that hold it."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.nn import AccumulatedBatchNorm

from . import oracle
from .tolerances import ORACLE, REORDERED, SAME

D = torch.float64
SHAPES = [(4,), (4, 7), (4, 5, 3), (4, 1, 1), (4, 2, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def attached(channels: int = 4, dtype: torch.dtype = D, **options: object) -> tuple[AccumulatedBatchNorm, nn.Module]:
    """A layer with random affine parameters, and an optimizer that it listens to and that changes nothing."""
    layer = AccumulatedBatchNorm(channels, dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.0)
    ab.attach(layer, optimizer)
    return layer, optimizer


def batches(shape: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = D) -> list[Tensor]:
    return [torch.randn(n, *shape, dtype=dtype) * (1 + i) + i for i, n in enumerate(sizes)]


def statistics(layer: nn.Module) -> list[Tensor]:
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


@every_shape
@pytest.mark.parametrize("sizes", [(3, 2, 5, 1), (2, 2, 2), (1, 3)], ids=str)
def test_outputs_and_every_gradient(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """'share': float64 autograd through BatchNorm of the concatenation, whose earlier part is a constant."""
    layer, _ = attached(gradient="share")
    seen: list[Tensor] = []
    for x in batches(shape, sizes):
        x.requires_grad_()
        out = layer(x)
        if x.numel() > x.shape[1] or seen:  # one value alone is another test
            expected = oracle.normalise(
                x, *oracle.batch_moments(torch.cat([*seen, x])), layer.weight, layer.bias, layer.eps
            )
            torch.testing.assert_close(out, expected, **ORACLE)
            cotangent, wanted = torch.randn_like(out), [x, layer.weight, layer.bias]
            for mine, theirs in zip(
                torch.autograd.grad(out, wanted, cotangent),
                torch.autograd.grad(expected, wanted, cotangent),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs, **ORACLE)
        seen.append(x.detach())


@every_shape
@pytest.mark.parametrize("sizes", [(3, 2, 5, 2), (2, 2, 2)], ids=str)
def test_the_whole_gradient(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """'whole': BatchNorm's backward written out, by the pooled moments and the micro-batch's own means of g."""
    layer, _ = attached()
    seen: list[Tensor] = []
    for x in batches(shape, sizes):
        x.requires_grad_()
        out, g = layer(x), torch.randn_like(x)
        seen.append(x.detach())
        mean, var = oracle.batch_moments(torch.cat(seen))
        torch.testing.assert_close(out, oracle.normalise(x, mean, var, layer.weight, layer.bias, layer.eps), **ORACLE)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(out, [x, layer.weight, layer.bias], g)
        by_channel = (1, -1, *[1] * (x.dim() - 2))
        y_hat = (x - mean.view(by_channel)) / torch.sqrt(var + layer.eps).view(by_channel)
        over = (0, *range(2, x.dim()))
        a = (layer.weight / torch.sqrt(var + layer.eps)).view(by_channel)
        expected = a * (g - g.mean(over, True) - y_hat * (g * y_hat).mean(over, True))
        torch.testing.assert_close(grad_x, expected, **ORACLE)
        torch.testing.assert_close(grad_weight, (g * y_hat).sum(over), **ORACLE)
        torch.testing.assert_close(grad_bias, g.sum(over), **ORACLE)


@every_shape
def test_ends_on_the_whole_batch(shape: tuple[int, ...]) -> None:
    """Running statistics after S unequal micro-batches are torch's after the whole batch, for several batches."""
    layer, optimizer = attached()
    whole = (
        nn.BatchNorm1d(4, dtype=D) if len(shape) < 3 else {3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](4).to(D)
    )
    for _ in range(3):
        parts = batches(shape, (2, 3, 1))
        for part in parts:
            layer(part)
        whole(torch.cat(parts))
        optimizer.step()
        for a, b in zip(statistics(layer), statistics(whole), strict=True):
            torch.testing.assert_close(a, b, **ORACLE)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.sampled_from([0.1, 1.0, None]))
def test_any_split_gives_the_same_statistics(sizes: list[int], positions: int, momentum: float | None) -> None:
    x = torch.randn(sum(sizes) + 1, 3, positions, dtype=D) + 2
    layer, optimizer = attached(3, momentum=momentum)
    whole = nn.BatchNorm1d(3, momentum=momentum, dtype=D)
    for _ in range(2):
        for part in torch.split(x, [1, *sizes]):
            layer(part)
        whole(x)
        optimizer.step()
    for a, b in zip(statistics(layer), statistics(whole), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


@every_shape
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_one_micro_batch_is_batchnorm(shape: tuple[int, ...], options: dict) -> None:
    """Outputs, gradients and running statistics over several steps, in float32."""
    net = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][max(0, len(shape) - 1)](4, **options)
    layer = ab.AccumulatedBN().build(copy.deepcopy(net))
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True), *layer.parameters()], lr=0.1)
    other = torch.optim.SGD([torch.zeros((), requires_grad=True), *net.parameters()], lr=0.1)
    ab.attach(layer, optimizer)
    for _ in range(3):
        x = (torch.randn(3, *shape) + 1).requires_grad_()
        outs = [module(x) for module in (net, layer)]
        cotangent = torch.randn_like(outs[0])
        grads = [
            torch.autograd.grad(out, [x, *module.parameters()], cotangent, retain_graph=True)
            for out, module in zip(outs, (net, layer), strict=True)
        ]
        torch.testing.assert_close(outs[1], outs[0], **SAME)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, **REORDERED)
        for out, one in zip(outs, (other, optimizer), strict=True):
            one.zero_grad()
            out.backward(cotangent, inputs=[p for p in one.param_groups[0]["params"][1:]] or None)
            one.step()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value, **REORDERED)


def test_evaluation_in_mid_accumulation_changes_nothing() -> None:
    layer, _ = attached()
    twin, _kept = attached()
    twin.load_state_dict(layer.state_dict())
    parts = batches((4, 3), (2, 3))
    for part in parts:
        expected = twin(part)
        out = layer.train()(part)
        layer.eval()(torch.randn(5, 4, 3, dtype=D))
        assert torch.equal(out, expected)
    for a, b in zip(statistics(layer), statistics(twin), strict=True):
        assert torch.equal(a, b)


def test_a_single_value_is_normalised_by_what_is_known() -> None:
    """By the running statistics alone, by the pool later; whatever its place, it counts in the whole."""
    layer, _ = attached()
    layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(statistics(layer))
    x = torch.randn(1, 4, dtype=D, requires_grad=True)
    out = layer(x)
    expected = oracle.normalise(x, *before[:2], layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(out, expected, **ORACLE)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, cotangent)[0] for o in (out, expected)), **ORACLE)
    for a, b in zip(statistics(layer), before, strict=True):
        assert torch.equal(a, b)  # one value has no variance to take in
    y = torch.randn(1, 4, dtype=D)
    expected = oracle.normalise(
        y, *oracle.batch_moments(torch.cat([x.detach(), y])), layer.weight, layer.bias, layer.eps
    )
    torch.testing.assert_close(layer(y), expected, **ORACLE)
    assert layer.num_batches_tracked == 1
    untracked = attached(track_running_stats=False)[0]
    torch.testing.assert_close(untracked(x), untracked.bias[None].expand(1, 4), **ORACLE)


@pytest.mark.parametrize("bad_at", [0, 1])
def test_a_micro_batch_that_is_not_finite_is_left_out(bad_at: int) -> None:
    layer, optimizer = attached()
    whole = nn.BatchNorm1d(4, dtype=D)
    good = batches((4, 3), (2, 3))
    bad = torch.full((2, 4, 3), float("nan"), dtype=D)
    for part in [*good[:bad_at], bad, *good[bad_at:]]:
        out = layer(part)
    whole(torch.cat(good))
    expected = oracle.normalise(good[-1], *oracle.batch_moments(torch.cat(good)), layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(out, expected, **ORACLE)
    for a, b in zip(statistics(layer), statistics(whole), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)
    optimizer.step()
    layer(bad)
    for a, b in zip(statistics(layer), statistics(whole), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


def test_a_second_forward_needs_an_optimizer() -> None:
    layer, x = AccumulatedBatchNorm(4), torch.randn(3, 4)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(4)(x), **SAME)
    with pytest.raises(ab.AnybatchError, match=r"second training forward.*ab\.attach\(model, optimizer\)"):
        layer(x)
    layer.eval()(x)


def test_each_of_two_optimizers_ends_the_batch_until_removed() -> None:
    layer, x = AccumulatedBatchNorm(4, dtype=D), torch.randn(3, 4, dtype=D)
    optimizers = [torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.1) for _ in range(2)]
    alone = layer(x)
    with ab.attach(layer, optimizers):
        for optimizer in optimizers:
            torch.testing.assert_close(layer(x), alone, **ORACLE)
            assert not torch.allclose(layer(x + 1), layer(x + 3))
            optimizer.step()
    layer(x)
    with pytest.raises(ab.AnybatchError, match="attach"):
        layer(x)


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    """The gradients overflowed: the next accumulated batch goes on with the pool, at the same weights, finite."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ab.convert_(model, ab.AccumulatedBN())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ab.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    parts = [torch.randn(2, 3) + i for i in range(3)]
    for step, x in enumerate(parts):
        optimizer.zero_grad()
        out = model(x)
        loss = (out * torch.randn_like(out)).sum() * (float("inf") if step == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert model[1].num_batches_tracked == max(1, step)  # of the skipped one and the next: one
        assert all(t.isfinite().all() for t in model.state_dict().values())
        if step == 1:
            assert out.isfinite().all()
            assert out.mean(0).sub(model[1].bias).abs().max() > 1e-3  # by both, not by itself


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dims", [(4,), (4, 3)], ids=str)
def test_checkpointed_training_is_plain_training(reentrant: bool, dims: tuple[int, ...]) -> None:
    """Bit for bit, over micro-batches and single values; the second run gathers nothing."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 4, 1) if len(dims) > 1 else nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        ab.convert_(model, ab.AccumulatedBN())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ab.attach(model, optimizer)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            for n in (1, 2, 3):
                x = torch.randn(n, *dims, requires_grad=True)
                out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                out.backward(torch.randn_like(out))
                seen += [out.detach(), x.grad]
            seen += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            seen += [b.clone() for b in model.buffers()]
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recomputed_after_later_micro_batches() -> None:
    """Two checkpointed micro-batches, then both backwards: each is repeated as it was."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer, _ = attached()
        xs = [x.requires_grad_() for x in batches((4, 3), (1, 2, 3))]
        outs = [checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x) for x in xs]
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
        grads.append([x.grad for x in xs])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_start_empty_and_unattached(copier) -> None:
    layer, _ = attached()
    x = torch.randn(3, 4, dtype=D)
    layer(x + 5)
    twin = copier(layer)
    torch.testing.assert_close(twin(x), AccumulatedBatchNorm(4, dtype=D)(x) * twin.weight + twin.bias, **ORACLE)
    with pytest.raises(ab.AnybatchError, match="attach"):
        twin(x)
    layer(x)


@pytest.mark.parametrize("how", ["load_state_dict", "reset_running_stats"])
def test_new_statistics_start_a_new_batch(how: str) -> None:
    """What is loaded in mid-accumulation is not undone by the next micro-batch."""
    layer, _ = attached()
    x = torch.randn(3, 4, dtype=D)
    layer(x + 5)
    fresh = AccumulatedBatchNorm(4, dtype=D)
    layer.load_state_dict(fresh.state_dict()) if how == "load_state_dict" else layer.reset_running_stats()
    layer(x), fresh(x)
    for a, b in zip(statistics(layer), statistics(fresh), strict=True):
        assert torch.equal(a, b)


def test_frozen_statistics_stay() -> None:
    layer, optimizer = attached()
    layer.track_running_stats = False
    before = copy.deepcopy(statistics(layer))
    for n in (2, 3):
        layer(torch.randn(n, 4, dtype=D))
    optimizer.step()
    for a, b in zip(statistics(layer), before, strict=True):
        assert torch.equal(a, b)


def test_an_accumulated_batch_is_taken_without_a_look_at_the_values() -> None:
    """Fake tensors have none to look at: what runs on them makes no host wait for a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer, optimizer = attached(dtype=torch.float32)
        for _ in range(2):
            for n in (1, 2, 3):
                layer(torch.randn(n, 4, 2)).sum().backward()
            optimizer.step()


def test_an_optimizer_that_is_gone_says_nothing_any_more() -> None:
    """Training on with another optimizer that nobody attached is refused, as it was at first."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), AccumulatedBatchNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ab.attach(model, optimizer)
    model(torch.randn(2, 3, 4, 4))
    model(torch.randn(2, 3, 4, 4))
    del optimizer
    gc.collect()
    model(torch.randn(2, 3, 4, 4))
    with pytest.raises(ab.AnybatchError, match=r"ab.attach\(model, optimizer\)"):
        model(torch.randn(2, 3, 4, 4))
    handle.remove()


def recalibrated(layer: nn.Module) -> None:
    ab.recalibrate_(layer, [torch.randn(9, 4, 3, dtype=D) * 2 + 1])


def written(layer: nn.Module) -> None:
    for t in statistics(layer)[:2]:
        t.copy_(torch.rand(4, dtype=D) + 3)


def replaced(layer: nn.Module) -> None:
    layer.running_mean, layer.running_var = (torch.rand(4, dtype=D) + 3 for _ in range(2))


@pytest.mark.parametrize("write", [recalibrated, written, replaced])
def test_statistics_written_in_mid_accumulation_are_what_the_move_starts_from(write) -> None:
    """One step of momentum away from them, towards the whole accumulated batch, however many micro-batches follow."""
    layer, _ = attached()
    parts = batches((4, 3), (2, 3, 1, 4))
    for part in parts[:2]:
        layer(part)
    write(layer)
    twin = nn.BatchNorm1d(4, dtype=D)
    twin.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(0)})
    for part in parts[2:]:
        layer(part)
    twin(torch.cat(parts))
    for a, b in zip(statistics(layer), statistics(twin), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


def test_statistics_written_back_as_they_were_change_nothing() -> None:
    """As a broadcast of buffers does, or a recalibration that raised."""
    layer, _ = attached()
    whole = nn.BatchNorm1d(4, dtype=D)
    parts = batches((4, 3), (2, 3, 1))
    for part in parts:
        layer(part)
        for t in statistics(layer):
            t.copy_(t.clone())
    whole(torch.cat(parts))
    for a, b in zip(statistics(layer), statistics(whole), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for n in (2, 3):
            out = model(torch.randn(n, 3))
            out.backward(torch.randn_like(out))
        optimizer.step()


def test_a_new_optimizer_that_nobody_attached_is_noticed() -> None:
    """The old one is alive and silent; gamma moved without its word."""
    model = nn.Sequential(nn.Linear(3, 4), AccumulatedBatchNorm(4))
    old, new = (torch.optim.SGD(ab.param_groups(model, 0.1, 0.1), lr=0.1) for _ in range(2))
    ab.attach(model, old)
    trained(model, old, 3)
    with pytest.raises(ab.AnybatchError, match=r"weight changed since .*ab\.attach\(model, optimizer\)"):
        trained(model, new, 3)
    ab.attach(model, new)
    trained(model, new, 3)


def test_a_frozen_gamma_may_be_written() -> None:
    """And a conversion of the model to another dtype is no step."""
    for frozen in (True, False):
        model = nn.Sequential(nn.Linear(3, 4), AccumulatedBatchNorm(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ab.attach(model, optimizer)
        model[1].weight.requires_grad_(not frozen)
        model(torch.randn(2, 3))
        if frozen:
            model[1].weight.fill_(2.0)
        model.double()(torch.randn(2, 3, dtype=D))


def test_an_optimizer_that_moves_the_weights_within_its_step_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), AccumulatedBatchNorm(4))
    optimizer = torch.optim.LBFGS(model.parameters())
    ab.attach(model, optimizer)
    x = torch.randn(5, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ab.AnybatchError, match="moves the weights only at their end"):
        optimizer.step(closure)


def test_unknown_gradients_are_refused() -> None:
    with pytest.raises(ab.AnybatchError, match=r"gradient='all'; choose one of 'whole', 'share'"):
        ab.AccumulatedBN(gradient="all")
