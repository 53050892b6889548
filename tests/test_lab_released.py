"""CBN the way of its authors computes what CBN.paper computes by closed forms, at every step."""

import copy

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import AnybatchError
from anybatch.lab import networks
from anybatch.lab.released import Released, ReleasedCBN

from .tolerances import ORACLE


def small(channels: int = 3) -> nn.Module:
    return networks.small_resnet(3, channels, (4, 6)).double()


def pair(window: int, burn_in_steps: int = 0) -> tuple[nn.Module, nn.Module]:
    """The same network, the authors' way and by CBN.paper."""
    released = small()
    paper = copy.deepcopy(released)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    config = Released(window, burn_in_steps)
    config.put_into(released, x)
    ab.convert_(paper, config.same(), example_inputs=x)
    return released.train(), paper.train()


@pytest.mark.parametrize(("window", "burn_in_steps"), [(1, 0), (3, 0), (4, 3)])
def test_it_is_cbn_as_released(window: int, burn_in_steps: int) -> None:
    models = pair(window, burn_in_steps)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in models]
    for step in range(6):
        x = torch.randn(2 + step % 2, 3, 8, 8, dtype=torch.float64)
        cotangent = torch.randn(len(x), 3, dtype=torch.float64)
        outs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(model(x))
            outs[-1].backward(cotangent)
        torch.testing.assert_close(*outs, **ORACLE)
        for mine, its in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, **ORACLE)
        for mine, its in zip(*(m.buffers() for m in models), strict=True):
            torch.testing.assert_close(mine, its, **ORACLE)
        for optimizer in optimizers:
            optimizer.step()
    if window > 1:  # the window told: BatchNorm would have given something else
        layer = copy.deepcopy(models[0].conv1)
        plain = ReleasedCBN(layer.map, layer.norm, window=1).train()
        assert not torch.allclose(plain(x), layer(x), rtol=1e-3)
    for model in models:
        model.eval()
    torch.testing.assert_close(models[0](x), models[1](x), **ORACLE)


def test_it_keeps_two_gradients_and_the_weights_of_every_past_batch() -> None:
    released, _ = pair(window=3)
    layer = released.conv1
    weight = layer.map.weight.numel()
    sizes = []
    for _ in range(4):
        released(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        sizes.append(sum(t.numel() for t in layer.history() if t.dim() > 1))
    assert sizes == [3 * weight, 6 * weight, 6 * weight, 6 * weight]
    assert not any(t.requires_grad for t in layer.history())


def test_options_are_those_of_cbn_as_released() -> None:
    assert Released.parse("released") == Released(window=8)
    assert Released.parse(" released(window=4, burn_in_steps=2)") == Released(4, 2)
    with pytest.raises(AnybatchError, match=r"method 'released\(size=4\)'.*options of released are: window"):
        Released.parse("released(size=4)")
    with pytest.raises(AnybatchError, match="window"):
        Released(window=0)


def test_a_norm_without_a_convolution_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(AnybatchError, match=r"'2'.*the authors' way needs a convolution of its own"):
        Released().put_into(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(AnybatchError, match="no convolution without bias"):
        Released().put_into(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8))
