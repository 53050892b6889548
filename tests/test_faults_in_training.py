"""The fault table of docs/reliability.md, in the user's own loop: bad batches and gradients, for every method."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import anybatch as ab

from .lab_children import assert_same
from .test_contract import converted, every_method, example

every_method_of_ours = pytest.mark.parametrize("name", [name for name in ab.METHODS if name != "bn"])


class Loop:
    """A training loop as users write them, that skips a step whose loss or gradients are not finite."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(3)
        self.net = converted(name).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        ab.attach(self.net, self.optimizer)

    def step(self, x: Tensor, seed: int, spoil: float = 1.0) -> bool:
        """One batch under a random cotangent times `spoil`; whether a step was made."""
        out = self.net(x)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        out.backward(g * spoil)
        norms = [p.grad.norm() for p in self.net.parameters() if p.grad is not None]
        finite = bool(torch.stack([*norms, out.detach().sum()]).isfinite().all())
        if finite:
            self.optimizer.step()
        return finite

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            torch.manual_seed(seed)
            assert self.step(example(2 + seed % 2), seed)

    def state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(dict(self.net.state_dict())),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "history": ab.history_state_dict(self.net),
        }


def assert_finite(state: Any, where: str = "state") -> None:
    if isinstance(state, Tensor):
        assert state.isfinite().all(), where
    elif isinstance(state, dict):
        for key, value in state.items():
            assert_finite(value, f"{where}[{key!r}]")


@every_method_of_ours
@pytest.mark.parametrize(
    ("bad", "where"),
    [(float("inf"), (0, 0, 4, 3)), (float("nan"), (1,)), (float("nan"), ())],
    ids=["an inf", "an example of nan", "all nan"],
)
@pytest.mark.parametrize("when", [0, 3])
def test_nan_batch_was_never_there(name: str, bad: float, where: tuple[int, ...], when: int) -> None:
    """Its step skipped: parameters, running statistics and history are those of a run that never saw it."""
    disturbed, undisturbed = Loop(name), Loop(name)
    disturbed.steps(0, when)
    x = example(2)
    x[where] = bad
    assert not disturbed.step(x, 99)
    disturbed.steps(when, 6)
    undisturbed.steps(0, 6)
    assert_finite(disturbed.state())
    assert_same(disturbed.state(), undisturbed.state())


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inf_gradient_moves_nothing(name: str, bad: float) -> None:
    """Its step skipped: weights are as before, and the steps after it are finite in everything."""
    loop = Loop(name)
    loop.steps(0, 3)
    before = {key: p.detach().clone() for key, p in loop.net.named_parameters()}
    assert not loop.step(example(2), 99, spoil=bad)
    assert_same({key: p.detach() for key, p in loop.net.named_parameters()}, before)
    assert_finite(loop.state())
    loop.steps(3, 6)
    assert_finite(loop.state())
    assert any(not torch.equal(p, before[key]) for key, p in loop.net.named_parameters())


@every_method_of_ours
def test_empty_batch_changes_nothing(name: str) -> None:
    """Forward and backward pass, every gradient is zero; running statistics and history stay."""
    loop = Loop(name)
    loop.steps(0, 3)
    before = loop.state()
    out = loop.net(example(0))
    assert out.shape[0] == 0
    loop.optimizer.zero_grad()
    out.backward(torch.randn(out.shape))
    for key, p in loop.net.named_parameters():
        assert p.grad is not None, key
        assert not p.grad.count_nonzero(), key
    assert_same(loop.state(), before)
    loop.optimizer.zero_grad()
    loop.steps(3, 5)
    assert_finite(loop.state())


@every_method
@pytest.mark.parametrize("size", [(13, 11), (5, 5), (64, 3)])
def test_image_of_a_new_size(name: str, size: tuple[int, int]) -> None:
    """In the middle of training, and back again."""
    loop = Loop(name)
    loop.steps(0, 3)
    before = loop.state()
    assert loop.step(torch.randn(2, 3, *size), 99)
    assert any(not torch.equal(value, before["model"][key]) for key, value in loop.net.state_dict().items())
    loop.steps(3, 5)
    assert_finite(loop.state())
    assert loop.net.eval()(torch.randn(1, 3, *size)).isfinite().all()


def test_the_loop_learns_something() -> None:
    """So that the tests above test something: two runs of different images differ."""
    loops = Loop("cbn"), Loop("cbn")
    loops[0].steps(0, 3)
    loops[1].steps(1, 4)
    with pytest.raises(AssertionError):
        assert_same(loops[0].state(), loops[1].state())


def test_torch_batchnorm_keeps_nan() -> None:
    """What the two tests above leave it out for: its running statistics take a bad batch, and count an empty one."""
    loop = Loop("bn")
    loop.net(example(0))
    assert loop.net.bn1.num_batches_tracked == 1
    assert not loop.step(torch.full((2, 3, 9, 7), float("nan")), 99)
    loop.steps(0, 3)
    assert loop.net.bn1.running_mean.isnan().all()
