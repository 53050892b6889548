"""What every layer of the library shares: to the outside it is torch's BatchNorm.

Names, shapes and order of the state_dict are torch's; isinstance checks against ``_BatchNorm`` hold; ``eval()`` is
torch's BatchNorm on the running statistics.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.affine import per_channel
from ..errors import AnybatchError

__all__ = ["TORCH_BATCH_NORMS", "NormLayer", "Remembers"]

TORCH_BATCH_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_RANKS = {0: (2, 3, 4, 5), 1: (2, 3), 2: (4,), 3: (5,)}


@runtime_checkable
class Remembers(Protocol):
    """A layer with training state outside of its state_dict, saved by :func:`anybatch.history_state_dict`."""

    histories: dict[int, Any]

    def history_state(self) -> dict[str, Any]:
        """Copies of the state, as plain tensors by name."""

    def read_history_state(self, state: Mapping[str, Any], where: str) -> dict[int, Any]:
        """The histories in such a state, checked against the layer ``where``; assigned to ``histories`` they go on."""


class NormLayer(_BatchNorm):
    """A layer that replaces torch's BatchNorm under the same names.

    Args:
        num_features: C, the channels (dim 1 of the input).
        eps: added to the variance, inside the square root.
        momentum: torch's: the weight of the new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has a weight (gamma).
        track_running_stats: whether it keeps running statistics; without them evaluation uses the batch's own.
        bias: whether an affine layer has a bias (beta).
        options: the method's own, by name; what repr shows besides.

    State: weight (C,), bias (C,), running_mean (C,), running_var (C,), num_batches_tracked (), as torch's BatchNorm.
    """

    foldable: ClassVar[bool] = True
    dims: int = 0  # spatial dimensions an input must have; 0: the first one settles it
    options: dict[str, Any]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        if not isinstance(num_features, int) or num_features < 1:
            raise AnybatchError(f"{name}: num_features={num_features!r}; give a whole number of at least 1")
        if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
            raise AnybatchError(f"{name}: momentum={momentum!r}; give a number from 0 to 1, or None")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.options = options

    @classmethod
    def replacing(cls, bn: _BatchNorm, **options: Any) -> Self:
        """A layer in the place of ``bn``: the same Parameter and buffer objects, eps, momentum and mode."""
        layer = cls(bn.num_features, eps=bn.eps, momentum=bn.momentum, affine=False, device="meta", **options)
        _take_over(bn, layer)
        known = [d for d, torch_class in TORCH_BATCH_NORMS.items() if isinstance(bn, torch_class)]
        layer.dims = known[0] if known else getattr(bn, "dims", 0)
        return layer

    def to_batchnorm(self) -> _BatchNorm:
        """Torch's plain BatchNorm in this layer's place: the same Parameter and buffer objects."""
        bn = TORCH_BATCH_NORMS.get(self.dims, nn.BatchNorm2d)(self.num_features, self.eps, self.momentum, device="meta")
        _take_over(self, bn)
        return bn

    def check(self, y: Tensor) -> None:
        """Refuse an input the layer cannot normalise.

        Raises:
            AnybatchError: wrong number of dimensions or channels, an integer dtype, or another dtype or device than
                the layer's.
        """
        name, shape = type(self).__name__, tuple(y.shape)
        if y.dim() not in _RANKS[self.dims]:
            wanted = {0: "(N, C, ...)", 1: "(N, C) or (N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}[self.dims]
            raise AnybatchError(f"{name}: the input has shape {shape}; give it {wanted}")
        if y.shape[1] != self.num_features:
            raise AnybatchError(
                f"{name}: the input has shape {shape}, {y.shape[1]} channels in dim 1, and the layer has "
                f"num_features={self.num_features}; build it with num_features={y.shape[1]} or mend the input"
            )
        if not y.is_floating_point():
            raise AnybatchError(f"{name}: the input is {y.dtype}; convert it to a floating dtype, e.g. x.float()")
        self.dims = self.dims or max(1, y.dim() - 2)
        own = self.weight if self.weight is not None else self.running_mean
        if own is None:
            return
        mixed_precision = y.dtype in (torch.float16, torch.bfloat16) and own.dtype == torch.float32
        if y.dtype != own.dtype and not mixed_precision:
            raise AnybatchError(
                f"{name}: the input is {y.dtype} and the layer {own.dtype}; convert one of them, e.g. model.to(x.dtype)"
            )
        if y.device != own.device:
            raise AnybatchError(
                f"{name}: the input is on {y.device} and the layer on {own.device}; move one, e.g. model.to(x.device)"
            )

    def infer(self, y: Tensor) -> Tensor:
        """Torch's BatchNorm in evaluation: by the running statistics, or by the batch's where none are kept."""
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(y, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def pass_empty(self, y: Tensor) -> Tensor:
        """An empty batch through the affine part, so that every parameter still gets its (zero) gradient."""
        if self.weight is not None:
            y = y * per_channel(self.weight, y)
        return y if self.bias is None else y + per_channel(self.bias, y)

    def extra_repr(self) -> str:
        """The constructor's arguments, so that repr(layer) evaluates to an equal layer."""
        own: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum}
        if not self.affine:
            own["affine"] = False
        elif self.bias is None:
            own["bias"] = False
        if not self.track_running_stats:
            own["track_running_stats"] = False
        return ", ".join([str(self.num_features), *(f"{k}={v!r}" for k, v in {**own, **self.options}.items())])


def _take_over(source: _BatchNorm, target: _BatchNorm) -> None:
    target._parameters = dict(source._parameters)
    target._buffers = dict(source._buffers)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    target.affine, target.track_running_stats = source.affine, source.track_running_stats
    target.training = source.training
