"""Copies of a model in mid-training, and a model moved: averaged, copied, pickled, cast, made on the meta device."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import anybatch as ab
from anybatch.layers.base import NormLayer

from .lives import assert_same, batch, optimizer_of, random_like, started, steps, training_state
from .test_contract import C, Net, converted, every_method, example
from .tolerances import ORACLE, REORDERED

# torch lists what a device context acts on at its first use: that must not be after conftest.py has put itself there.
with torch.device("meta"):
    torch.empty(0)

DECAY = 0.75
# Two maps and two norms, each rounding to u = 5e-4 or 4e-3 what is of order 10.
ROUNDED = {torch.float16: {"rtol": 2e-2, "atol": 2e-2}, torch.bfloat16: {"rtol": 0.16, "atol": 0.16}}
# Three steps of training in float32: each multiplies what the last one left by some ten.
CHAINED = {"rtol": 1e-4, "atol": 1e-4}


def through_a_file(net: nn.Module) -> nn.Module:
    """Pickled, as pickle.dumps does it but for the tensors' values."""
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_copier = pytest.mark.parametrize("copier", [copy.deepcopy, through_a_file], ids=["deepcopy", "torch.save"])


# Averaged models


@every_method
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_beside_training_changes_nothing(name: str, use_buffers: bool) -> None:
    """Bit for bit; parameters (and buffers, if asked) are averaged, the history neither averaged nor shared."""
    alone, optimizer = started(name)
    wanted = steps(alone, optimizer, 0, 6)

    net, optimizer = started(name)
    outs = steps(net, optimizer, 0, 2)
    ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)
    averages: dict[str, Tensor] = {}
    for step in range(2, 6):
        outs += steps(net, optimizer, step, step + 1)
        ema.update_parameters(net)
        for key, value in net.state_dict().items():
            averaged = value.is_floating_point() and (use_buffers or key in dict(net.named_parameters()))
            old = averages.get(key, value) if averaged else value
            averages[key] = old + (value - old) * (1 - DECAY) if averaged else value.clone()
    assert_same(outs, wanted)
    assert_same(training_state(net), training_state(alone))

    assert not any(ab.history_state_dict(ema)["layers"].values())
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, averages[key], **REORDERED)
    fresh = converted(name).eval()
    fresh.load_state_dict(ema.module.state_dict())
    x = example()
    assert_same(ema.eval()(x), fresh(x))


@every_method
def test_averaged_weights_swapped_in_for_an_evaluation(name: str) -> None:
    """Into the model that trains, and its own put back: no bit of its training changes."""

    def run(swapping: bool) -> tuple[list[Tensor], dict]:
        net, optimizer = started(name)
        outs = steps(net, optimizer, 0, 2)
        ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY), use_buffers=True)
        for step in range(2, 6):
            outs += steps(net, optimizer, step, step + 1)
            ema.update_parameters(net)
            if swapping:
                x, own = example(), copy.deepcopy(net.state_dict())
                net.load_state_dict(ema.module.state_dict())
                assert_same(net.eval()(x), ema.eval()(x))
                net.load_state_dict(own)
                net.train()
        return outs, training_state(net)

    assert_same(run(swapping=True), run(swapping=False))


SPREAD = {"cbn", "cbn-naive", "renorm", "iebn-cbn"}  # running_var is the total variance, that of the means too
OTHER_MOMENTS = {"bgn", "ghost", "batch-group"}  # of groups, not of the batch
NONE = {"gn", "proxynorm", "proxynorm-group", "nonorm"}


@every_method
def test_update_bn(name: str) -> None:
    """The first norm of an averaged model gets what torch's BatchNorm gets, or by its own definition."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 2)
    ema = swa_utils.AveragedModel(net)
    ema.update_parameters(net)
    with torch.no_grad():
        ys = [ema.module.conv1(batch(step)) for step in range(10, 15)]
    modes = [module.training for module in ema.modules()]
    swa_utils.update_bn([batch(step) for step in range(10, 15)], ema)
    assert [module.training for module in ema.modules()] == modes
    assert torch.isfinite(ema.eval()(example())).all()
    if name in NONE:
        return
    first = ema.module.bn1
    assert first.momentum == 0.1
    plain = nn.BatchNorm2d(C, momentum=None)
    for y in ys:
        plain(y)
    if name not in OTHER_MOMENTS:
        torch.testing.assert_close(first.running_mean, plain.running_mean, **REORDERED)
    var = plain.running_var
    if name in SPREAD:
        means = torch.stack([y.mean((0, 2, 3)) for y in ys])
        var = torch.stack([y.var((0, 2, 3), correction=0) for y in ys]).mean(0) + means.var(0, correction=0)
    if name not in OTHER_MOMENTS:
        torch.testing.assert_close(first.running_var, var, **REORDERED)


@every_method
def test_update_bn_gives_the_same_again(name: str) -> None:
    """The statistics are reset first: what an earlier call left, at other weights perhaps, has no part in them."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 1)
    data, states = [batch(step) for step in range(3)], []
    for _ in range(2):
        swa_utils.update_bn(data, net)
        states.append({key: buffer.clone() for key, buffer in net.named_buffers()})
    assert_same(*states)


# Copies


@every_method
@every_copier
def test_a_copy_taken_in_mid_training(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    """Between a forward and its backward: the original trains on bit for bit; so does a copy given the history."""
    alone, optimizer = started(name)
    wanted = steps(alone, optimizer, 0, 6)

    net, optimizer = started(name)
    outs = steps(net, optimizer, 0, 2)
    out = net(batch(2))
    copier(net)
    optimizer.zero_grad()
    out.backward(random_like(out, 2))
    optimizer.step()
    outs.append(out.detach())

    twin = copier(net)
    assert not any(ab.history_state_dict(twin)["layers"].values())
    ab.load_history_state_dict(twin, ab.history_state_dict(net))
    other = optimizer_of(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(steps(twin, other, 3, 6), wanted[3:])
    assert_same(training_state(twin), training_state(alone))
    assert_same(outs + steps(net, optimizer, 3, 6), wanted)
    assert_same(training_state(net), training_state(alone))


@every_method
@every_copier
def test_a_copy_without_the_history_starts_anew(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    """Taken between two micro-batches, it trains as a model that was given the weights; its layers follow its maps."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 3)
    net(batch(3))
    twin, fresh = copier(net), started(name)[0]
    fresh.load_state_dict(net.state_dict())
    assert_same(*(steps(each, optimizer_of(each), 3, 6) for each in (twin, fresh)))
    assert_same(training_state(twin), training_state(fresh))
    for layer in (module for module in twin.modules() if isinstance(module, NormLayer)):
        assert all(module in set(twin.modules()) for module in getattr(layer, "maps", ()))


@every_copier
def test_a_copy_is_converted_and_reverted_on_its_own(copier: Callable[[nn.Module], nn.Module]) -> None:
    """Its hooks are its own: they go with its layers, and the original's stay."""
    net, optimizer = started("cbn")
    steps(net, optimizer, 0, 2)
    for change in (ab.revert_, lambda twin: ab.convert_(twin, ab.GhostBN(), example())):
        twin = copier(net)
        change(twin)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    ab.convert_(twin, ab.CBN(window=3), example())
    steps(twin, optimizer_of(twin), 2, 4)
    steps(net, optimizer, 2, 4)
    assert net.bn1.maps == (net.conv1,)


seen: list[str] = []


def note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen.append("before")


def note_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    seen.append("after")


def note_gradient(module: nn.Module, given: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    seen.append("backward")


@every_method
@every_copier
def test_hooks_of_the_user_go_along(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    """On a norm and on the map before it, and the copy trains with them as the model without them."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 2)
    hooked = copier(net)
    for module in (hooked.bn1, hooked.conv2):
        module.register_forward_pre_hook(note_input)
        module.register_forward_hook(note_output)
        module.register_full_backward_hook(note_gradient)
    twin, bare = copier(hooked), copier(net)
    seen.clear()
    outs = steps(twin, optimizer_of(twin), 2, 5)
    assert sorted(seen) == ["after"] * 6 + ["backward"] * 6 + ["before"] * 6
    assert_same(outs, steps(bare, optimizer_of(bare), 2, 5))
    assert_same(training_state(twin), training_state(bare))


# Moved models


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_model_evaluates(name: str, dtype: torch.dtype) -> None:
    net, optimizer = started(name)
    steps(net, optimizer, 0, 4)
    x = example()
    wanted = net.eval()(x)
    out = net.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, **(REORDERED if dtype == torch.float64 else ROUNDED[dtype]))


@every_method
def test_a_model_cast_in_mid_window_trains_on(name: str) -> None:
    """The history goes along: float64 from the third step on is what float32 would have done, to its rounding."""
    net, optimizer = started(name)
    steps(net, optimizer, 0, 3)
    wide = copy.deepcopy(net).double()
    ab.load_history_state_dict(wide, ab.history_state_dict(net))
    for layer in (module for module in wide.modules() if isinstance(module, NormLayer)):
        assert all(int(h.forwards) == 3 for h in getattr(layer, "histories", {}).values())
    outs = [steps(model, optimizer_of(model), 3, 6) for model in (wide, net)]
    for a, b in zip(*outs, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, **CHAINED)


@every_method
def test_made_on_the_meta_device(name: str) -> None:
    """Built, converted and filled with weights afterwards, a model trains as one that always had them."""
    source, _ = started(name)
    with torch.device("meta"):
        net = Net()
        ab.convert_(net, ab.METHODS[name].small, example_inputs=example())
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}
    net.to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    assert_same(steps(net, optimizer_of(net), 0, 4), steps(source, optimizer_of(source), 0, 4))
    assert_same(training_state(net), training_state(source))


@every_method
def test_channels_last_from_mid_training_on(name: str) -> None:
    """The same training in another memory format, what was gathered so far in the first one."""
    net, optimizer = started(name, torch.float64)
    other, other_optimizer = started(name, torch.float64)
    for model, its in ((net, optimizer), (other, other_optimizer)):
        steps(model, its, 0, 2)
    other.to(memory_format=torch.channels_last)
    torch.testing.assert_close(steps(other, other_optimizer, 2, 6), steps(net, optimizer, 2, 6), **ORACLE)
    torch.testing.assert_close(training_state(other), training_state(net), **ORACLE)


@every_method
def test_two_models_trained_in_turn(name: str) -> None:
    """Each as if it were alone, bit for bit."""
    wanted = []
    for first in (0, 20):
        net, optimizer = started(name)
        wanted.append((steps(net, optimizer, first, first + 5), training_state(net)))
    a, b = started(name), started(name)
    outs: list[list[Tensor]] = [[], []]
    for step in range(5):
        for (net, optimizer), first, got in zip((a, b), (0, 20), outs, strict=True):
            got += steps(net, optimizer, first + step, first + step + 1)
    for (net, _), got, (expected, state) in zip((a, b), outs, wanted, strict=True):
        assert_same(got, expected)
        assert_same(training_state(net), state)
