"""What the tests of a model's lives share: a small model, steps that can be repeated, and all that training leaves."""

from typing import Any

import torch
from torch import Tensor, nn

import anybatch as ab

from .test_contract import converted

__all__ = ["assert_same", "batch", "optimizer_of", "random_like", "started", "steps", "training_state"]


def started(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A converted model and its optimizer, the same at every call."""
    torch.manual_seed(7)
    net = converted(name, dtype=dtype)
    return net, optimizer_of(net)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    ab.attach(net, optimizer)
    return optimizer


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two or three examples, by the number of the step alone."""
    return torch.randn(2 + step % 2, 3, 9, 7, generator=torch.Generator().manual_seed(step)).to(dtype)


def random_like(out: Tensor, step: int) -> Tensor:
    """A cotangent, by the number of the step alone."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1000 + step)).to(out.dtype)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    """Training steps number ``first`` to ``last - 1``; their outputs."""
    outs = []
    for step in range(first, last):
        out = net(batch(step, next(net.parameters()).dtype))
        optimizer.zero_grad()
        out.backward(random_like(out, step))
        optimizer.step()
        outs.append(out.detach())
    return outs


def training_state(net: nn.Module) -> dict[str, Any]:
    """Copies of all that training goes on from, but for the optimizer."""
    state = {name: t.detach().clone() for name, t in net.state_dict().items()}
    return {"state": state, "history": ab.history_state_dict(net)["layers"]}


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
