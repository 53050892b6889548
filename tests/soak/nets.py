"""Small nets of three stages, each with other maps before its norms.

Smooth activations: a rectifier's gradient jumps where a rounded value changes its sign, and no tolerance allows for it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["NETS", "SHAPES", "Net", "memory_format"]

C = 8


class Net(nn.Module):
    """Three stages, of which ``checkpointing`` says what is run again in the backward."""

    checkpointing = "none"

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.stages
        again = partial(checkpoint, use_reentrant=self.checkpointing.startswith("reentrant"))
        match self.checkpointing.removeprefix("reentrant "):
            case "whole":
                return again(self.stages, x)
            case "block":
                return last(again(middle, first(x)))
            case "norm":
                conv, norm, act = first
                return last(middle(act(again(norm, conv(x)))))
        return self.stages(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


def stage(a_map: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d, channels: int = C) -> nn.Sequential:
    return nn.Sequential(a_map, norm(channels), nn.SiLU())


def strided() -> Net:
    return Net(
        stage(nn.Conv2d(3, C, 3, stride=2, bias=False)),
        stage(nn.Conv2d(C, C, (3, 2), padding=1, dilation=(1, 2), groups=2)),
        nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
    )


def depthwise() -> Net:
    block = nn.Sequential(*stage(nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False)), *stage(nn.Conv2d(C, C, 1)))
    return Net(stage(nn.Conv2d(3, C, 3, padding=1, padding_mode="reflect")), block, nn.Conv2d(C, 5, 1))


def residual() -> Net:
    body = nn.Sequential(
        *stage(nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False)),
        *(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)),
    )
    shortcut = nn.Sequential(nn.Conv2d(C, C, 1, stride=2), nn.BatchNorm2d(C))
    last = nn.Sequential(nn.SiLU(), nn.Conv2d(C, 5, 1))
    return Net(stage(nn.Conv2d(3, C, 3)), Residual(body, shortcut), last)


def preactivation() -> Net:
    """The norm of its middle stage follows no map."""
    body = nn.Sequential(nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, C, 3, padding=1))
    return Net(stage(nn.Conv2d(3, C, 3)), Residual(body, nn.Identity()), nn.Conv2d(C, 5, 1))


def transposed() -> Net:
    return Net(
        stage(nn.Conv2d(3, C, 3, stride=2)),
        stage(nn.ConvTranspose2d(C, C, 3, 2, 1, output_padding=1, groups=2)),
        nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C, affine=False)),
    )


def linear() -> Net:
    """Wider: an example's groups of channels are to have more than two values, which may be next to equal."""
    norm, c = nn.BatchNorm1d, 4 * C
    return Net(stage(nn.Linear(6, c), norm, c), stage(nn.Linear(c, c, bias=False), norm, c), nn.Linear(c, 5))


def signal() -> Net:
    norm = nn.BatchNorm1d
    return Net(
        stage(nn.Conv1d(2, C, 4, stride=2), norm),
        stage(nn.Conv1d(C, C, 3, padding=2, dilation=2, groups=4), norm),
        nn.Sequential(nn.ConvTranspose1d(C, C, 3, bias=False), norm(C)),
    )


def volume() -> Net:
    norm = nn.BatchNorm3d
    return Net(
        stage(nn.Conv3d(2, C, 2, bias=False), norm),
        stage(nn.Conv3d(C, C, 3, padding=1, groups=C), norm),
        nn.ConvTranspose3d(C, 3, 2),
    )


_IMAGES = ((3, 9, 7), (3, 12, 8), (3, 7, 11))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(("strided", "depthwise", "residual", "preactivation", "transposed"), _IMAGES),
    "linear": ((6,),),
    "signal": ((2, 25), (2, 32), (2, 19)),
    "volume": ((2, 5, 4, 3), (2, 4, 4, 6), (2, 6, 3, 4)),
}
NETS: dict[str, Callable[[], Net]] = {
    make.__name__: make for make in (strided, depthwise, residual, preactivation, transposed, linear, signal, volume)
}


def memory_format(net: str) -> torch.memory_format:
    """Channels last, where the inputs have a place for it."""
    return {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(SHAPES[net][0]) - 1, torch.contiguous_format)
