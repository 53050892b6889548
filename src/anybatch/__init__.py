"""Normalization that keeps its accuracy at any batch size, for PyTorch."""

from . import nn as nn
from .errors import AnybatchError as AnybatchError
from .methods import BN as BN
from .methods import CBN as CBN
from .methods import GN as GN
from .methods import METHODS as METHODS
from .methods import parse_method as parse_method
from .training import history_state_dict as history_state_dict
from .training import load_history_state_dict as load_history_state_dict

__version__ = "0.1.0"
__all__ = [
    "BN",
    "CBN",
    "GN",
    "METHODS",
    "AnybatchError",
    "history_state_dict",
    "load_history_state_dict",
    "nn",
    "parse_method",
]
