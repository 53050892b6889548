"""A method as the callable that hosts build their norms with: torchvision's ``norm_layer=``, timm's, detectron2's
``get_norm``.

CBN then has to see the whole model once: :func:`pair_`. For a model that is built already, ``anybatch.convert_`` does
all of it in one call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import AnybatchError
from ..layers.config import NormConfig
from ._by_name import pair_, place

__all__ = ["norm_layer", "pair_"]


def norm_layer(config: NormConfig, eps: float = 1e-5, momentum: float | None = 0.1) -> Callable[..., nn.Module]:
    """A function of (channels) that builds the layer of ``config``, for models of 2-d convolutions.

    Args:
        config: the method. Where it needs the map that feeds the norm (CBN does), the layers refuse to train until
            :func:`pair_` has seen the model.
        eps: of the norms; a model that sets its own (MobileNet, EfficientNet) does so with its default norm only.
        momentum: of the norms; likewise.

    Returns:
        A function of (channels), which takes ``device`` and ``dtype`` besides, as timm gives them. It raises where the
        model asks for norms that call their activation.

    Raises:
        AnybatchError: ``config`` is no config.
    """
    check_config("norm_layer", config)

    def make(
        num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **more: Any
    ) -> nn.Module:
        if more:
            raise AnybatchError(
                f"norm_layer: the model builds a norm with {', '.join(more)}, so its norms call their activation: "
                "give it anybatch.integrations.timm.norm_act_layer(config, act_layer=...)"
            )
        return place(config, nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype))

    return make


def check_config(call: str, config: NormConfig) -> None:
    """Refuse what is no config, before a host calls anything.

    Raises:
        AnybatchError: it is a class, a name or the like.
    """
    if not isinstance(config, NormConfig):
        raise AnybatchError(f"{call}: the config is {config!r}; give an instance such as ab.CBN()")
