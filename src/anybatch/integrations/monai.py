"""MONAI: the methods as norms of its layer factory, so that ``UNet(..., norm=("CBN", {"window": 8}))`` builds them.

Importing this module registers them, by the names of their configs. CBN then has to see the whole network once:
:func:`pair_`. For a network that is built already, ``anybatch.convert_`` does all of it in one call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ._by_name import NAMES, build, pair_
from ._hosts import require

__all__ = ["pair_"]

_Norm = require("monai.networks.layers.factories", "monai").Norm


def _factory(name: str, dim: int) -> Callable[..., nn.Module]:
    """What MONAI calls with the channels of each norm; ``dim``: its spatial dimensions."""

    def make(num_features: int, **options: Any) -> nn.Module:  # MONAI looks for num_features by name
        return build(name, num_features, dim, **options)

    return make


for _name in NAMES:
    _Norm.add_factory_callable(_name, partial(_factory, _name), f"{_name} of anybatch")
