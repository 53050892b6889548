"""Normalization that keeps its accuracy at any batch size, for PyTorch."""

from . import nn as nn
from .convert import Report as Report
from .convert import convert_ as convert_
from .convert import revert_ as revert_
from .errors import AnybatchError as AnybatchError
from .inference import fold as fold
from .inference import recalibrate_ as recalibrate_
from .layers.cbn import CBN as CBN
from .layers.torch_own import BN as BN
from .layers.torch_own import GN as GN
from .methods import METHODS as METHODS
from .methods import parse_method as parse_method
from .training import attach as attach
from .training import history_state_dict as history_state_dict
from .training import load_history_state_dict as load_history_state_dict

__version__ = "0.1.0"
__all__ = [
    "BN",
    "CBN",
    "GN",
    "METHODS",
    "AnybatchError",
    "Report",
    "attach",
    "convert_",
    "fold",
    "history_state_dict",
    "load_history_state_dict",
    "nn",
    "parse_method",
    "recalibrate_",
    "revert_",
]
