"""timm's families whose norms call their activation (EfficientNet, MobileNet, RegNet, DenseNet, ...): what their
``norm_layer=`` takes.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..layers.config import NormConfig
from ._by_name import pair_, place
from ._hosts import require
from .norm_layer import check_config

__all__ = ["norm_act_layer", "pair_"]


def norm_act_layer(
    config: NormConfig, act_layer: Any = "relu", eps: float = 1e-5, momentum: float | None = 0.1
) -> Callable[..., nn.Module]:
    """A function of (channels, ...) that builds the layer of ``config`` with the activation behind it.

    Args:
        config: the method, as for :func:`anybatch.integrations.norm_layer.norm_layer`.
        act_layer: as timm has it, a name or a class: the model's own, which timm does not tell to a function.
        eps: of the norms.
        momentum: of the norms.

    Returns:
        A function that takes what timm gives to its ``BatchNormAct2d``.

    Raises:
        AnybatchError: timm is not installed, or ``config`` is no config.
    """
    check_config("norm_act_layer", config)
    fused = require("timm.layers", "timm").BatchNormAct2d
    own = {"act_layer": act_layer, "eps": eps, "momentum": momentum}

    # A function: of anything else timm goes by the name of the class.
    def make(num_features: int, **options: Any) -> nn.Module:
        return place(config, fused(num_features, **{**own, **options}))

    return make
