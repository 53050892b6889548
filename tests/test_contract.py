"""What every method of the table is held to; a new row earns all of it.

Each check first asserts that the method did something, so that none passes on a model it left alone.
"""

import copy
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.layers.base import NormLayer

from .tolerances import HALF, LARGE_MEAN

every_method = pytest.mark.parametrize("name", ab.METHODS)
C = 8


class Net(nn.Module):
    """A strided convolution and its norm, a residual sum, a depthwise convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.bn2 = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x)) + x


def example(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 9, 7, dtype=dtype)


def converted(name: str, net: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = (Net() if net is None else net).to(dtype)
    report = ab.convert_(net, ab.METHODS[name].small, example_inputs=example(dtype=dtype))
    assert len(report.converted) == (0 if name == "bn" else 2), str(report)
    return net


def train(net: nn.Module, steps: int = 3, n: int = 2) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    ab.attach(net, optimizer)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        out = net(example(n, dtype))
        out.backward(torch.randn(out.shape, dtype=dtype))
        optimizer.step()


@every_method
def test_evaluates_one_example(name: str) -> None:
    """An example's output in evaluation does not depend on the batch it is in."""
    net = converted(name)
    train(net)
    net.eval()
    x = example(4)
    torch.testing.assert_close(net(x[:1]), net(x)[:1], rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_large_mean(name: str, training: bool) -> None:
    """At mean 1e4 and variance 1 the layer does in float32 what it does in float64."""
    outs = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(1)
        bn = nn.BatchNorm2d(C).to(dtype)
        with torch.no_grad():
            bn.running_mean.fill_(1e4)
        layer = ab.METHODS[name].small.build(bn).train(training)
        outs.append(layer((torch.randn(3, C, 5, 4) + 1e4).to(dtype)))
    torch.testing.assert_close(outs[1].double(), outs[0], **LARGE_MEAN)


@every_method
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_range(name: str, dtype: torch.dtype) -> None:
    """Inputs whose squares and sums overflow float16 give finite outputs near float32's."""
    x = (torch.randn(2, C, 16, 16) * 300 + 1000).to(dtype)
    outs = [ab.METHODS[name].small.build(nn.BatchNorm2d(C))(y) for y in (x, x.float())]
    assert outs[0].dtype == dtype
    torch.testing.assert_close(outs[0].float(), outs[1], **HALF[dtype])


@every_method
def test_state_dict_in_mid_training(name: str) -> None:
    """Strict, both ways with plain BatchNorm where the method keeps its names; and to a second model always."""
    net = converted(name)
    train(net)
    other = converted(name)
    other.load_state_dict(net.state_dict(), strict=True)
    plain = Net()
    state, names = net.state_dict(), plain.state_dict()
    layer = net.bn1
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        adds, reshapes = getattr(layer, "adds", ()), getattr(layer, "reshapes", ())
        assert [k for k in state if k in names] == list(names)
        assert {k.rpartition(".")[2] for k in state if k not in names} == set(adds)
        assert all(
            v.shape == names[k].shape or k.rpartition(".")[2] in reshapes for k, v in state.items() if k in names
        )
        if not adds and not reshapes:
            plain.load_state_dict(net.state_dict(), strict=True)
            net.load_state_dict(plain.state_dict(), strict=True)
    for model in (net, other, plain):
        model.eval()
    x = example()
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    if ab.METHODS[name].foldable and _evaluates_by_its_buffers(layer):
        torch.testing.assert_close(plain(x), net(x), rtol=0, atol=0)


def _evaluates_by_its_buffers(layer: nn.Module) -> bool:
    """Whether evaluation uses the running statistics as they are, and not pooled over channels or the like."""
    if not isinstance(layer, NormLayer):
        return True
    mean, var = layer.channel_moments()
    return mean is layer.running_mean and var is layer.running_var


@every_method
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}]
)
def test_repr_evaluates_back(name: str, options: dict) -> None:
    """By the names of the module that has it; which are public is a decision of its own (test_methods.py)."""
    config = ab.METHODS[name].small
    assert eval(repr(config), vars(sys.modules[type(config).__module__])) == config
    layer = config.build(nn.BatchNorm2d(C, **options))
    again = eval(repr(layer), {**vars(nn), **vars(sys.modules[type(layer).__module__])})
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in layer.state_dict().items()
    ]


@every_method
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 7), (2, 4, 5, 3), (3, 4, 2, 3, 2)], ids=str)
def test_first_step_gradients(name: str, shape: tuple[int, ...]) -> None:
    """Numerically, in float64, for the input and every parameter (gradcheck's cotangents are random)."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    fresh = ab.METHODS[name].small.build(kind(4).double())
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_()
    names = [n for n, _ in fresh.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        layer = copy.deepcopy(fresh)  # a first step every time
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in fresh.parameters()]
    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


@every_method
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_on_its_own(name: str, copier) -> None:
    """The same in evaluation, and training it leaves the original as it is."""
    net = converted(name)
    train(net)
    twin = copier(net)
    before = copy.deepcopy(net.state_dict())
    train(twin)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any(not torch.equal(v, before[k]) for k, v in twin.state_dict().items())


@every_method
def test_channels_last(name: str) -> None:
    """The same outputs and gradients in either memory format, and the format is kept."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(2)
        net = converted(name).to(memory_format=memory_format)
        train(net)
        x = example().to(memory_format=memory_format).requires_grad_()
        out = net(x)
        assert out.is_contiguous(memory_format=memory_format)
        results.append(
            [
                out,
                *torch.autograd.grad(
                    out, [x, *(p for p in net.parameters() if p.requires_grad)], torch.randn(out.shape)
                ),
            ]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_method
def test_a_cotangent_of_any_layout(name: str) -> None:
    """Expanded and transposed gradients are the same gradients."""
    grads = []
    for layout in (lambda g: g.contiguous(), lambda g: g):
        torch.manual_seed(4)
        layer = ab.METHODS[name].small.build(nn.BatchNorm2d(C))
        x = torch.randn(2, C, 5, 3, requires_grad=True)
        g = layout(torch.randn(2, C, 3, 1).expand(2, C, 3, 5).transpose(2, 3))
        grads.append(torch.autograd.grad(layer(x), x, g)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@every_method
def test_reverts_and_folds(name: str) -> None:
    """Back to plain BatchNorm bit for bit; folded to float error. What cannot says so."""
    net = converted(name)
    train(net)
    net.eval()
    x = example()
    wanted = net(x)
    if ab.METHODS[name].foldable:
        folded = ab.fold(net, example_inputs=x)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
        torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-4)
    if any(isinstance(m, NormLayer) for m in net.modules()):
        ab.revert_(net)
        assert type(net.bn1) is type(net.bn2) is nn.BatchNorm2d
        assert not ab.METHODS[name].foldable or torch.equal(net(x), wanted)


@every_method
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.randn(2, C + 1, 4, 4), "num_features|channels"),
        (torch.ones(2, C, 4, 4, dtype=torch.long), "int64|Long|long"),
        (torch.randn(2, C, 4, 4, dtype=torch.float64), "float64|Double|double"),
    ],
    ids=["channels", "integers", "dtype"],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_input_is_refused(name: str, bad: Tensor, said: str, training: bool) -> None:
    layer = ab.METHODS[name].small.build(nn.BatchNorm2d(C)).train(training)
    if isinstance(layer, NormLayer):
        with pytest.raises(ab.AnybatchError, match=said):
            layer(bad)
    else:  # torch's own layers say it in torch's words
        with pytest.raises((RuntimeError, ValueError)):
            layer(bad)
