"""The table of methods: a config says what, a layer does it, one walker converts.

Adding a method is one file in layers/ and one row here; the contract tests, the converter, the command line and the
lab enumerate this table.
"""

import ast
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import AnybatchError
from .layers.base import NormLayer
from .layers.cbn import CrossIterationBatchNorm, check_options

__all__ = ["BN", "CBN", "GN", "METHODS", "Method", "NormConfig", "parse_method"]


class NormConfig(ABC):
    """What a norm shall become. Frozen; its repr evaluates to an equal config."""

    @abstractmethod
    def build(self, bn: _BatchNorm) -> nn.Module:
        """The layer in place of ``bn``: same Parameter and buffer objects, eps, momentum, mode.

        Raises:
            AnybatchError: this method cannot replace ``bn``.
        """

    @property
    def needs_map(self) -> bool:
        """Whether the layer has to know the linear map that feeds it."""
        return False


@dataclass(frozen=True)
class BN(NormConfig):
    """torch's own BatchNorm: the reference, and the way back."""

    def build(self, bn: _BatchNorm) -> nn.Module:
        """``bn`` itself, or plain BatchNorm where it is a layer of this library."""
        return bn.to_batchnorm() if isinstance(bn, NormLayer) else bn


@dataclass(frozen=True)
class GN(NormConfig):
    """torch's own GroupNorm, for comparison; it keeps no running statistics, so their names leave the state_dict.

    Args:
        groups: of channels; where it does not divide them, their greatest common divisor with it.
    """

    groups: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or self.groups < 1:
            raise AnybatchError(f"GN: groups={self.groups!r}; give a whole number of at least 1")

    def build(self, bn: _BatchNorm) -> nn.Module:
        """nn.GroupNorm with the affine parameters of ``bn``."""
        channels = bn.num_features
        layer = nn.GroupNorm(math.gcd(self.groups, channels), channels, bn.eps, affine=False)
        layer.affine = bn.affine
        layer.weight, layer.bias = bn.weight, bn.bias
        return layer.train(bn.training)


@dataclass(frozen=True)
class CBN(NormConfig):
    """Cross-Iteration BatchNorm; every option as in :class:`anybatch.nn.CrossIterationBatchNorm`.

    Args:
        window: batches pooled, the current one included.
        gradient: 'history' or 'current'.
        compensate: carry past moments over to today's weights.
        pooling: 'samples' or 'equal'.
        expansion: 'deviation' or 'second_moment'.
        average_reductions: backwards over which the reductions for earlier layers are averaged; 0 for none.
        momentum_batch: examples at which momentum is torch's; None: every forward counts the same.
        running: 'total' or 'torch'.
        burn_in_steps: training forwards of plain BatchNorm at first.
    """

    window: int = 8
    gradient: Literal["history", "current"] = "history"
    compensate: bool = True
    pooling: Literal["samples", "equal"] = "samples"
    expansion: Literal["deviation", "second_moment"] = "deviation"
    average_reductions: int = 128
    momentum_batch: int | None = 32
    running: Literal["total", "torch"] = "total"
    burn_in_steps: int = 0

    def __post_init__(self) -> None:
        check_options(**asdict(self))

    @classmethod
    def paper(cls, window: int = 8, burn_in_steps: int = 0) -> "CBN":
        """Every switch as the paper and its released code have it (eps inside the root, as BatchNorm)."""
        return cls(
            window=window,
            gradient="current",
            pooling="equal",
            expansion="second_moment",
            average_reductions=0,
            momentum_batch=None,
            running="torch",
            burn_in_steps=burn_in_steps,
        )

    @property
    def needs_map(self) -> bool:
        """True where past moments are compensated."""
        return self.compensate and self.window > 1

    def build(self, bn: _BatchNorm) -> nn.Module:
        """A CrossIterationBatchNorm; the converter tells it which map it follows."""
        return CrossIterationBatchNorm.replacing(bn, **asdict(self))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: as typed on the command line.
        make: config from options.
        label: as called in tables and plots.
        summary: one line.
        source: paper.
        foldable: whether inference is an affine map per channel with constants, so that it folds into a convolution.
        per_example: whether training statistics see one example at a time.
        cost: about what a training forward costs in BatchNorm's, at one example on a CPU; to plan runs by.
    """

    name: str
    make: Callable[..., NormConfig]
    label: str
    summary: str
    source: str
    foldable: bool = True
    per_example: bool = False
    cost: float = 1.0

    @property
    def config(self) -> NormConfig:
        """The method with its default options."""
        return self.make()

    @property
    def needs_map(self) -> bool:
        """Whether its layers have to know the map that feeds them."""
        return self.config.needs_map


_ROWS = (
    Method("bn", BN, "BatchNorm", "torch's BatchNorm: moments of the current batch", "Ioffe & Szegedy 2015"),
    Method(
        "gn",
        GN,
        "GroupNorm",
        "torch's GroupNorm: moments of channel groups of one example",
        "Wu & He 2018",
        foldable=False,
        per_example=True,
    ),
    Method(
        "cbn",
        CBN,
        "CBN",
        "moments pooled over recent iterations, carried to today's weights",
        "Yao et al. 2021, and ours",
        cost=4.0,
    ),
    Method(
        "cbn-naive",
        partial(CBN, compensate=False),
        "CBN, no compensation",
        "moments pooled over recent iterations as they were; the history is a constant",
        "Yao et al. 2021",
        cost=2.5,
    ),
    Method(
        "cbn-paper",
        CBN.paper,
        "CBN as released",
        "CBN with every switch as its authors have it",
        "Yao et al. 2021",
        cost=4.0,
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def parse_method(text: str) -> NormConfig:
    """A config from what one types: ``cbn`` or ``cbn(window=16, pooling='equal')``.

    Raises:
        AnybatchError: an unknown method (the closest names are given), an unknown option or a value out of range.
    """
    name, _, rest = text.strip().partition("(")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, cutoff=0.3) or list(METHODS)
        raise AnybatchError(
            f"unknown method {name!r}; did you mean {' or '.join(close)}? (`anybatch methods` lists all)"
        )
    try:
        call = ast.parse(f"f({rest}" if rest else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise SyntaxError("options are given by name")
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return METHODS[name].make(**options)
    except (SyntaxError, TypeError) as error:
        raise AnybatchError(f"method {text!r}: {error}; write it like cbn(window=16)") from error
    except AnybatchError as error:
        raise AnybatchError(f"method {text!r}: {error}") from error
