"""What an example run of the model found around a norm, in words that layers and configs understand."""

from dataclasses import dataclass

from torch import nn

__all__ = ["ACTIVATIONS", "Fed", "Surroundings"]

# Elementwise functions of one tensor, perhaps with a parameter a channel, by their names in torch.
ACTIVATIONS = frozenset(
    {
        *("relu", "relu6", "hardtanh", "threshold", "clamp", "clamp_min", "leaky_relu", "prelu", "elu", "celu", "selu"),
        *("gelu", "silu", "mish", "hardswish", "sigmoid", "hardsigmoid", "log_sigmoid", "tanh", "softplus"),
        *("softsign", "hardshrink", "softshrink", "tanhshrink"),
    }
)


@dataclass(frozen=True)
class Fed:
    """A linear map that feeds a norm.

    Args:
        map: the module.
        inside: the norm is a child of the map and runs inside the map's forward.
    """

    map: nn.Module
    inside: bool = False


@dataclass(frozen=True)
class Surroundings:
    """Where a norm stands in its model.

    Args:
        feeds: the maps whose output it normalises; none where it cannot follow one.
        exclusive: no one but this norm uses what the maps give.
        activation: the elementwise function that alone takes its output, as torch calls it ("relu", "silu", ...);
            empty where there is none.
        shortcut: it normalises the projection of a residual block's shortcut.
        called: the example run called it; where there was none, or nobody asked, it counts as called.
        rows: of its input for each example that the model was given; None where nobody saw.
    """

    feeds: tuple[Fed, ...] = ()
    exclusive: bool = True
    activation: str = ""
    shortcut: bool = False
    called: bool = True
    rows: int | None = None
