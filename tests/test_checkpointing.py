"""Training under activation checkpointing is bit-identical to plain training, history included."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab

from .test_contract import example
from .test_history import assert_equal
from .tolerances import REORDERED


class Block(nn.Module):
    """One convolution and norm, called several times, as a head on several levels is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def inner(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def run(mode: str, levels: int, steps: int = 6) -> tuple[list[Tensor], nn.Module]:
    torch.manual_seed(0)

    class Net(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem_bn(self.stem(x)).relu()
            for _ in range(levels):
                x = self.inner(x) if mode == "plain" else checkpoint(self.inner, x, use_reentrant=mode == "reentrant")
            return x

    net = Net()
    ab.convert_(net, ab.CBN(window=4, average_reductions=5), example_inputs=example())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        # Accumulated over two batches; not over several levels too, where nested backwards add up in another order.
        for _ in range(2 if levels == 1 else 1):
            out = net(torch.randn(2, 3, 9, 7, generator=generator))
            out.backward(torch.randn(out.shape, generator=generator))
            seen.append(out.detach())
        seen += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return seen, net


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_checkpointed_training_is_plain_training(mode: str, levels: int) -> None:
    plain, net = run("plain", levels)
    checkpointed, other = run(mode, levels)
    if mode == "reentrant" and levels > 1:
        # A weight used on several levels gets its gradient as (a3 + b3) + (a2 + b2) where plain autograd adds
        # ((a3 + b3) + a2) + b2, a from the map and b from the norm: equal up to that.
        for a, b in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(a, b, **REORDERED)
        return
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert_equal(ab.history_state_dict(other), ab.history_state_dict(net))
    for (name, a), (_, b) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert net.bn.histories[0].forwards == (12 if levels == 1 else 6 * levels)  # one entry a forward


def test_recomputing_something_else_is_an_error() -> None:
    conv, bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    net = nn.Sequential(conv, bn)
    ab.convert_(net, ab.CBN(), example_inputs=torch.randn(2, 2, 5, 5))
    noise = iter([0.0, 1.0])
    out = checkpoint(
        lambda x: net(x + x * next(noise)), torch.randn(2, 2, 5, 5, requires_grad=True), use_reentrant=False
    )
    with pytest.raises(ab.AnybatchError, match="deterministic"):
        out.backward(torch.randn_like(out))


@pytest.mark.parametrize(("mode", "kept"), [("plain", 0), ("not reentrant", 3), ("reentrant", 3)])
def test_what_waits_for_a_second_run_is_what_a_checkpoint_ran(mode: str, kept: int) -> None:
    """Weight-sized tensors hang on it: nothing in plain training, the last step's levels under a checkpoint."""
    _, net = run(mode, levels=3)
    assert len(net.bn._replay._runs) == kept
    assert len(net.stem_bn._replay._runs) == 0
