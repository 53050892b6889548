"""Small models, each with one way in which maps and norms meet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it: the activation, and a dropout that mostly is none, inside of the norm."""

    def __init__(self, num_features: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class ResNet(nn.Module):
    """Every norm fed by one map, with an auxiliary head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU())
        self.blocks = nn.Sequential(Block(5, 5), Block(5, 7, 2))
        self.aux = nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(7, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        aux = self.aux(x) if self.training else None
        y = self.bn(self.fc(self.blocks(x).mean((2, 3))))
        return y if aux is None else (y, aux)


class SharedHead(nn.Module):
    """A convolution on several levels: one norm for all of them, or one a level."""

    def __init__(self, per_level: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(5)] * 3)
        if per_level:
            self.norms = nn.ModuleList([nn.BatchNorm2d(5) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 3)]
        return [norm(self.conv(level)) for norm, level in zip(self.norms, levels, strict=True)]


class SharedNorm(nn.Module):
    """One norm after two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)).mean() + self.bn(self.b(x))


class ConvNorm(nn.Conv2d):
    """A norm inside of its convolution, as detectron2 has it."""

    def __init__(self, *args: object, norm: nn.Module | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.relu(x if self.norm is None else self.norm(x))


class Unpairable(nn.Module):
    """Norms that no map's hook can serve."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.borrowed, self.after_borrowed = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.linear, self.after_permute = nn.Linear(5, 4), nn.BatchNorm2d(4)
        self.first, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.conv(F.relu(self.sum(x + 1)))
        x = self.after_borrowed(F.conv2d(x, self.borrowed.weight))
        return self.after_permute(self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, self.stride, self.padding)


class Sometimes(nn.Module):
    """Its norm gets a map's output, and elsewhere a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.bn(y + x)


class Residue(nn.Module):
    """The output of its map goes to the norm and, by ``use``, elsewhere."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.conv, self.bn, self.use = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), use

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        z = self.bn(y)
        match self.use:
            case "add":
                return z + y
            case "method":
                return z * y.sigmoid().mean()
            case "inplace":
                return z, y.relu_().mean()
            case "output":
                return {"z": z, "features": [y]}
            case "again":
                return z, self.conv(x + 1).mean()
            case "weight":
                return z, F.conv2d(x, self.conv.weight).mean()
            case "branch":
                return z if y.shape[0] > 0 and y.dim() == 4 else None
        return z


class Steps(nn.Module):
    """Control flow that torch.fx cannot trace, and keyword-only inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, *, image: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            if image.mean() > -1e9:
                image = self.bn(self.conv(input=image))
        return image


def assorted() -> list[tuple[nn.Module, Tensor]]:
    """Every kind of map, each followed by its norm, with an input."""
    return [
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(6, 5)),
        (nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False)), torch.randn(6, 5)),
        (nn.Sequential(nn.Conv1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6)), torch.randn(3, 4, 11)),
        (nn.Sequential(nn.Conv2d(3, 5, (3, 2), padding="same"), nn.BatchNorm2d(5)), torch.randn(2, 3, 7, 9)),
        (
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)),
            torch.randn(2, 4, 5, 6),
        ),
        (
            nn.Sequential(nn.Conv2d(3, 5, 3, padding=2, dilation=2, padding_mode="reflect"), nn.BatchNorm2d(5)),
            torch.randn(2, 3, 7, 9) + 3,
        ),
        (nn.Sequential(nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)), torch.randn(2, 2, 3, 4, 5)),
        (nn.Sequential(nn.ConvTranspose1d(3, 5, 3, 2), nn.BatchNorm1d(5)), torch.randn(2, 3, 5)),
        (
            nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(6)),
            torch.randn(2, 4, 3, 5),
        ),
        (nn.Sequential(nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)), torch.randn(2, 2, 3, 2, 4)),
    ]


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noise(nn.Module):
    """Another weight at every reading."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def parametrized(kind: str) -> nn.Conv2d:
    conv = nn.Conv2d(3, 5, 3)
    match kind:
        case "weight_norm":
            return parametrizations.weight_norm(conv)
        case "spectral_norm":
            return parametrizations.spectral_norm(conv)
    parametrize.register_parametrization(conv, "weight", Noise() if kind == "noise" else Double())
    return conv


def shake(model: nn.Module) -> nn.Module:
    """Random affine parameters and running statistics, as training would leave them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3.0)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    nn.init.normal_(parameter)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def assert_untouched(model: nn.Module, modules: list[nn.Module], before: dict[str, Tensor]) -> None:
    assert list(model.modules()) == modules
    assert list(tensors(model)) == list(before)
    assert all(tensor is before[name] for name, tensor in tensors(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def flat(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for item in (output.values() if isinstance(output, dict) else output) for t in flat(item)]


def train_step(model: nn.Module, x: Tensor) -> None:
    outputs = flat(model(x))
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
