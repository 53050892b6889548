"""Normalization that keeps its accuracy at any batch size, for PyTorch."""

from typing import TYPE_CHECKING

from . import kernels as kernels
from . import nn as nn
from .convert import Report as Report
from .convert import convert_ as convert_
from .convert import revert_ as revert_
from .diagnose.advice import advise as advise
from .diagnose.monitor import Monitor as Monitor
from .errors import AnybatchError as AnybatchError
from .inference import fold as fold
from .inference import recalibrate_ as recalibrate_
from .inference import tune_example_weight as tune_example_weight
from .inference import weigh_examples_ as weigh_examples_
from .layers.accumulated import AccumulatedBN as AccumulatedBN
from .layers.batch_group import BatchGroupNorm as BatchGroupNorm
from .layers.bgn import BGN as BGN
from .layers.cbn import CBN as CBN
from .layers.ghost import GhostBN as GhostBN
from .layers.iebn import IEBN as IEBN
from .layers.nonorm import NoNorm as NoNorm
from .layers.proxy import ProxyNorm as ProxyNorm
from .layers.renorm import BatchRenorm as BatchRenorm
from .layers.torch_own import BN as BN
from .layers.torch_own import GN as GN
from .layers.weighed import ExampleWeighedBN as ExampleWeighedBN
from .methods import METHODS as METHODS
from .methods import parse_method as parse_method
from .training import attach as attach
from .training import history_state_dict as history_state_dict
from .training import load_history_state_dict as load_history_state_dict
from .training import param_groups as param_groups

if TYPE_CHECKING:
    from .diagnose.diagnosis import diagnose as diagnose
else:
    from . import diagnose as diagnose  # the package, which can be called

__version__ = "0.1.0"
__all__ = [
    "BGN",
    "BN",
    "CBN",
    "GN",
    "IEBN",
    "METHODS",
    "AccumulatedBN",
    "AnybatchError",
    "BatchGroupNorm",
    "BatchRenorm",
    "ExampleWeighedBN",
    "GhostBN",
    "Monitor",
    "NoNorm",
    "ProxyNorm",
    "Report",
    "advise",
    "attach",
    "convert_",
    "diagnose",
    "fold",
    "history_state_dict",
    "kernels",
    "load_history_state_dict",
    "nn",
    "param_groups",
    "parse_method",
    "recalibrate_",
    "revert_",
    "tune_example_weight",
    "weigh_examples_",
]
