"""Stopping and resuming in mid-window, and what may not be loaded."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab

from .test_contract import Net, example


CONFIGS = {
    "exponential": ab.CBN(window=5, positions=20, average_reductions=7),
    "bfloat16": ab.CBN(window=5, storage="bfloat16", average_reductions=7),
    "all positions": ab.CBN(window=5, positions=None, average_reductions=7),
    "ring": ab.CBN(window=5, kind="ring", average_reductions=7),
}


def started(config: ab.CBN | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    ab.convert_(net, config or CONFIGS["exponential"], example_inputs=example())
    return net, torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        out = net(torch.randn(2 + step % 2, 3, 9, 7, generator=generator))
        loss = (out * torch.randn(out.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def through_a_file(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stop", [1, 3, 9])
def test_resume_in_mid_window_is_bit_identical(stop: int, config: str) -> None:
    """Model, optimizer and history through a weights-only file; losses and every tensor equal afterwards."""
    whole, whole_optimizer = started(CONFIGS[config])
    expected = steps(whole, whole_optimizer, 0, 12)

    first, optimizer = started(CONFIGS[config])
    steps(first, optimizer, 0, stop)
    saved = through_a_file([first.state_dict(), optimizer.state_dict(), ab.history_state_dict(first)])

    second, optimizer = started(CONFIGS[config])
    second.load_state_dict(saved[0], strict=True)
    optimizer.load_state_dict(saved[1])
    ab.load_history_state_dict(second, saved[2])
    resumed = steps(second, optimizer, stop, 12)

    assert all(torch.equal(a, b) for a, b in zip(resumed, expected[stop:], strict=True))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert_equal(ab.history_state_dict(second), ab.history_state_dict(whole))


def test_without_its_history_the_run_goes_on_differently() -> None:
    """So that the test above tests something."""
    whole, optimizer = started()
    expected = steps(whole, optimizer, 0, 6)
    first, optimizer = started()
    steps(first, optimizer, 0, 3)
    first.bn1.histories.clear()
    assert not torch.equal(steps(first, optimizer, 3, 6)[0], expected[3])


def test_history_is_no_part_of_the_state_dict_nor_of_copies() -> None:
    net, optimizer = started()
    steps(net, optimizer, 0, 3)
    assert list(net.state_dict()) == list(Net().state_dict())
    assert not any(ab.history_state_dict(copy.deepcopy(net))["layers"].values())
    assert {n for n, _ in net.named_buffers()} == {n for n, _ in Net().named_buffers()}


def test_saved_history_is_a_copy() -> None:
    net, optimizer = started()
    steps(net, optimizer, 0, 2)
    state = ab.history_state_dict(net)
    kept = copy.deepcopy(state)
    steps(net, optimizer, 2, 4)
    assert_equal(state, kept)
    other, optimizer = started()
    ab.load_history_state_dict(other, state)
    steps(other, optimizer, 2, 4)
    assert_equal(state, kept)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.update(version=99), "version 1"),
        (lambda s: s["layers"].pop("bn1"), "bn1"),
        (lambda s: s["layers"].update(nowhere={}), "nowhere"),
        (lambda s: s["layers"]["bn2"]["0"].pop("count"), "bn2.*count"),
        (lambda s: s["layers"]["bn2"]["0"].update(patch=torch.zeros(6, 5, 3)), "bn2.*patch.*(6, 5, 3)"),
        (lambda s: s["layers"]["bn2"]["0"].update(forwards=torch.zeros(3)), "forwards"),
        (lambda s: s["layers"]["bn2"].update({"7": s["layers"]["bn2"].pop("0")}), "'7'"),
        (lambda s: s["layers"]["bn2"].update(x=3), "'x'"),
        (lambda s: s["layers"]["bn2"].update({"0": None}), "NoneType"),
    ],
    ids=[
        *("version", "missing layer", "unknown layer", "missing tensor", "another patch", "kind"),
        *("unknown map", "unknown key", "no history"),
    ],
)
def test_unfit_history_is_refused_and_nothing_changes(spoil, said: str) -> None:
    net, optimizer = started()
    steps(net, optimizer, 0, 2)
    state = ab.history_state_dict(net)
    spoil(state)
    steps(net, optimizer, 2, 4)
    before = ab.history_state_dict(net)
    with pytest.raises(ab.AnybatchError, match=said):
        ab.load_history_state_dict(net, state)
    assert_equal(ab.history_state_dict(net), before)


def test_a_ring_without_its_free_slot_is_refused() -> None:
    net, optimizer = started(CONFIGS["ring"])
    steps(net, optimizer, 0, 2)
    state = ab.history_state_dict(net)
    state["layers"]["bn2"]["0"]["slot"].fill_(99)
    with pytest.raises(ab.AnybatchError, match="bn2.*slot 99 of 5"):
        ab.load_history_state_dict(net, state)


@pytest.mark.parametrize(("saved", "mine"), [("ring", "exponential"), ("exponential", "ring")])
def test_history_of_another_kind_is_refused(saved: str, mine: str) -> None:
    """By what it has and what the layer keeps; nothing changes."""
    net, optimizer = started(CONFIGS[saved])
    steps(net, optimizer, 0, 2)
    other, optimizer = started(CONFIGS[mine])
    steps(other, optimizer, 0, 1)
    before = ab.history_state_dict(other)
    with pytest.raises(ab.AnybatchError, match=r"bn1.*it has .*scalars.* and the layer keeps .*scalars.*kind="):
        ab.load_history_state_dict(other, ab.history_state_dict(net))
    assert_equal(ab.history_state_dict(other), before)


@pytest.mark.parametrize(("saved", "mine"), [("exponential", "bfloat16"), ("bfloat16", "exponential")])
def test_history_kept_in_another_dtype_is_converted(saved: str, mine: str) -> None:
    net, optimizer = started(CONFIGS[saved])
    steps(net, optimizer, 0, 2)
    other, optimizer = started(CONFIGS[mine])
    ab.load_history_state_dict(other, ab.history_state_dict(net))
    covariance = other.bn1.histories[0].covariance
    assert covariance.dtype == (torch.bfloat16 if mine == "bfloat16" else torch.float32)
    assert torch.equal(covariance.bfloat16(), net.bn1.histories[0].covariance.bfloat16())
    steps(other, optimizer, 2, 4)


def test_an_exponential_history_serves_any_window() -> None:
    """It has no window's shape; a ring's has."""
    net, optimizer = started(ab.CBN(window=3))
    steps(net, optimizer, 0, 2)
    other, optimizer = started(ab.CBN(window=4))
    ab.load_history_state_dict(other, ab.history_state_dict(net))
    steps(other, optimizer, 2, 3)
    assert other.bn1.histories[0].forwards == 3


def test_history_of_another_window_is_refused() -> None:
    net, optimizer = started(ab.CBN(window=3, kind="ring"))
    steps(net, optimizer, 0, 2)
    other, _ = started(ab.CBN(window=4, kind="ring"))
    with pytest.raises(ab.AnybatchError, match=r"bn1.*shape \(3,\).*shape \(4,\)"):
        ab.load_history_state_dict(other, ab.history_state_dict(net))


def assert_equal(a: dict, b: dict) -> None:
    assert a["version"] == b["version"]
    assert a["layers"].keys() == b["layers"].keys()
    for name, histories in a["layers"].items():
        assert histories.keys() == b["layers"][name].keys()
        for index, tensors in histories.items():
            for field, tensor in tensors.items():
                assert torch.equal(tensor, b["layers"][name][index][field]), (name, field)


def test_making_a_history_does_not_compute_a_parametrized_weight() -> None:
    """Spectral norm's power iteration moves with every reading of the weight in training."""
    conv = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    norm = ab.nn.CrossIterationBatchNorm(3).follows(conv)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    norm.history_of(0)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
