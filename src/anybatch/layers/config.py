"""A config says what a norm shall become; each method declares its own beside its layer."""

from abc import ABC
from dataclasses import asdict
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import NormLayer
from .surroundings import Surroundings

__all__ = ["NormConfig"]


class NormConfig(ABC):
    """What a norm shall become: a frozen dataclass whose fields are the options of its ``layer``.

    Its repr evaluates to an equal config. Options are checked when it is made.
    """

    layer: ClassVar[type[NormLayer]]

    def __post_init__(self) -> None:
        self.layer.check_options(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the layer is built with, besides what it takes over from the norm it replaces."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def build(self, bn: _BatchNorm) -> nn.Module:
        """The layer in place of ``bn``: same Parameter and buffer objects, eps, momentum, mode.

        Raises:
            AnybatchError: this method cannot replace ``bn``.
        """
        return self.layer.replacing(bn, **self.options)

    @property
    def needs_map(self) -> bool:
        """Whether the layer has to know the linear map that feeds it."""
        return False

    @property
    def needs_flow(self) -> bool:
        """Whether the layer has to know what follows the norm: its activation, or a residual sum."""
        return False

    @property
    def needs_example(self) -> bool:
        """Whether the converter has to run the model once, to see what stands around its norms."""
        return self.needs_map or self.needs_flow

    def in_groups(self, examples: int) -> "NormConfig | None":
        """What makes of one batch what this makes of its groups of so many examples, one after another.

        None if nothing here does, or not to the same gradients.
        """
        return None

    def at(self, around: Surroundings) -> "tuple[NormConfig, str]":
        """The config for a norm that stands like this, and why it is another than this one."""
        return self, ""
