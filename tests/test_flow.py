"""What an example run tells of the way on from each norm: the activation that takes it, the shortcut it projects."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.convert.flow import Flow
from anybatch.convert.walker import convert_

from .small_models import ConvNorm, ResNet, SharedHead, SharedNorm, assert_untouched, tensors

X = (2, 3, 15, 13)


def activation(after: Callable[[Tensor], object], training: bool = False) -> str:
    """What is found behind a norm whose output goes to ``after``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> object:
            return after(self.bn(self.conv(x)))

    model = Net().train(training)
    return Flow(model, [model.bn], torch.randn(X)).activation_of(model.bn)


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("relu", [F.relu, torch.relu, Tensor.relu, Tensor.relu_, F.relu_, nn.ReLU(), nn.ReLU(inplace=True)]),
        ("gelu", [F.gelu, nn.GELU(), nn.GELU(approximate="tanh")]),
        ("silu", [F.silu, nn.SiLU(), nn.SiLU(inplace=True)]),
        ("hardswish", [F.hardswish, nn.Hardswish(), nn.Hardswish(inplace=True)]),
        ("leaky_relu", [F.leaky_relu, nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, inplace=True)]),
        ("elu", [F.elu, nn.ELU(), nn.ELU(inplace=True)]),
        ("prelu", [nn.PReLU(), nn.PReLU(4)]),
        ("hardtanh", [F.hardtanh, nn.Hardtanh(), nn.ReLU6(), nn.ReLU6(inplace=True)]),
        ("relu6", [F.relu6]),
        ("mish", [F.mish, nn.Mish(), nn.Mish(inplace=True)]),
        ("tanh", [torch.tanh, Tensor.tanh, F.tanh, nn.Tanh(), Tensor.tanh_]),
        ("sigmoid", [torch.sigmoid, Tensor.sigmoid, nn.Sigmoid()]),
        ("softplus", [F.softplus, nn.Softplus()]),
        ("clamp", [lambda y: y.clamp(min=0), lambda y: y.clamp_(0, 6)]),
    ],
)
def test_activations_in_every_form(name: str, forms: list) -> None:
    for form in forms:
        assert activation(form) == name, form


def statement(y: Tensor) -> Tensor:
    y.relu_()
    return y * 2


class Shape(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        assert y.dim() == 4
        assert y.size(0) == y.shape[0]
        return y.relu()


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (lambda y: y, ""),
        (lambda y: y + 1, ""),
        (lambda y: y * y.sigmoid(), ""),
        (lambda y: (F.relu(y), y.mean()), ""),
        (lambda y: [F.relu(y), y], ""),
        (lambda y: F.relu(y) if y.mean().item() > -1e9 else y, ""),
        (lambda y: F.relu(y.flatten(1)), ""),
        (lambda y: F.softmax(y, 1), ""),
        (lambda y: F.relu(F.dropout(y, 0.5, training=True)), ""),
        (lambda y: F.relu(F.dropout(y, 0.5, training=False)), "relu"),
        (lambda y: F.relu(nn.Identity()(y)), "relu"),
        (lambda y: F.relu(y.contiguous()), "relu"),
        (lambda y: F.relu(y.float()), "relu"),
        (statement, "relu"),
        (Shape(), "relu"),
    ],
)
def test_only_an_activation_that_alone_takes_the_output_counts(after: Callable, found: str) -> None:
    assert activation(after) == found


def test_every_call_of_a_norm_counts() -> None:
    class Twice(nn.Module):
        def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.bn, self.second = nn.BatchNorm2d(3), second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.bn(F.relu(self.bn(x))))

    for second, found in ((F.relu, "relu"), (F.silu, ""), (torch.neg, "")):
        model = Twice(second)
        assert Flow(model, [model.bn], torch.randn(X)).activation_of(model.bn) == found
    model = SharedNorm()
    assert Flow(model, [model.bn], torch.randn(X)).activation_of(model.bn) == ""


def test_a_norm_inside_its_convolution_and_one_never_called() -> None:
    model = nn.Sequential(ConvNorm(3, 4, 3, norm=nn.BatchNorm2d(4)))
    idle = model[0].idle = nn.BatchNorm2d(4)
    flow = Flow(model, [model[0].norm, idle], torch.randn(X))
    assert flow.activation_of(model[0].norm) == "relu"
    assert flow.activation_of(idle) == ""
    assert not flow.is_shortcut(idle)
    assert flow.called == {model[0].norm}


class Bottleneck(nn.Module):
    """torchvision's, with one shared ReLU; ``down`` and ``sum`` are what differs between builders of such networks."""

    def __init__(self, inputs: int, outputs: int, down: nn.Module | None, sum: str = "+=") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down, self.sum = down, sum

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        identity = F.avg_pool2d(x, 2, ceil_mode=True) if self.down is None else self.down(x)
        match self.sum:
            case "+=":
                y += identity
            case "+":
                y = identity + y
            case "add_":
                y.add_(identity)
            case "add":
                y = torch.add(y, identity)
        return self.relu(y)


def projection(*before: nn.Module, **options: object) -> nn.Module:
    stride = 1 if before else 2
    return nn.Sequential(*before, nn.Conv2d(3, 6, 1, stride, bias=False, **options), nn.BatchNorm2d(6))


@pytest.mark.parametrize("sum", ["+=", "+", "add_", "add"])
@pytest.mark.parametrize(
    "down",
    [projection(), projection(nn.AvgPool2d(2, 2, ceil_mode=True)), None],
    ids=["strided", "pooled", "identity"],
)
def test_the_norm_of_a_projected_shortcut(down: nn.Module | None, sum: str) -> None:
    inputs = 3 if down is not None else 6
    model = nn.Sequential(nn.Conv2d(3, inputs, 3), Bottleneck(inputs, 6, down, sum), nn.Conv2d(6, 2, 1))
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    flow = Flow(model, norms.values(), torch.randn(X))
    found = {name.rpartition(".")[0] or name: flow.is_shortcut(norm) for name, norm in norms.items()}
    assert {name for name, norm in norms.items() if flow.is_shortcut(norm)} == {
        name for name in norms if "down" in name
    }, found
    taken = {name: flow.activation_of(norm) for name, norm in norms.items()}
    assert {name for name, act in taken.items() if act == "relu"} == {"1.bn1", "1.bn2"}
    assert set(taken.values()) == {"relu", ""}


class Pyramid(nn.Module):
    """Lateral norms are added to a deeper level too, but no block ends there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)) for _ in range(2))
        self.out = nn.Conv2d(5, 2, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stem(x)
        top = self.lateral[1](self.deep(F.avg_pool2d(fine, 2)))
        low = self.lateral[0](fine)
        low = low + F.interpolate(top, size=low.shape[-2:])
        return [self.out(low), self.out(top)]


class TwoBranches(nn.Module):
    """Equally long: neither is the other's shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("make", [Pyramid, TwoBranches, lambda: SharedHead(per_level=True)])
def test_other_sums_are_no_shortcuts(make: Callable[[], nn.Module]) -> None:
    model = make()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    flow = Flow(model, norms, torch.randn(X))
    assert not any(flow.is_shortcut(norm) for norm in norms)


def test_the_small_resnet() -> None:
    model = ResNet()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    modules, before = list(model.modules()), tensors(model)
    state = torch.get_rng_state()
    flow = Flow(model, norms.values(), torch.randn(X, generator=torch.Generator().manual_seed(1)))
    assert [name for name, norm in norms.items() if flow.is_shortcut(norm)] == ["blocks.1.downsample.1"]
    assert [name for name, norm in norms.items() if flow.activation_of(norm)] == [
        "stem.1",
        "blocks.0.bn1",
        "blocks.1.bn1",
    ]
    assert_untouched(model, modules, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in modules)
    assert all(norm.num_batches_tracked == 0 for norm in norms.values())


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model = ResNet()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    modules, before = list(model.modules()), tensors(model)
    with pytest.raises(ab.AnybatchError, match="in training mode, raised RuntimeError"):
        Flow(model, norms, torch.randn(1, 4, 9, 9))
    assert_untouched(model, modules, before)
    assert all(module.training for module in modules)


def test_a_config_that_asks_for_it_learns_it() -> None:
    """The converter hands on what was found, and leaves alone what the config says."""

    class Curious(ab.CBN):
        needs_flow = True

        def at(self, around: object) -> object:
            return (ab.BN(), "it is a shortcut's") if around.shortcut else (self, "")

    model = ResNet()
    report = convert_(model, Curious(window=2), example_inputs=torch.randn(X))
    (row,) = report.left
    assert (row.name, row.reason) == ("blocks.1.downsample.1", "it is a shortcut's")
    assert type(model.blocks[1].downsample[1]) is nn.BatchNorm2d
    with pytest.raises(ab.AnybatchError, match="pass example_inputs"):
        convert_(ResNet(), Curious(window=1))
