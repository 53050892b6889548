"""What every layer of the library shares: to the outside it is torch's BatchNorm.

Names, shapes and order of the state_dict are torch's; isinstance checks against ``_BatchNorm`` hold; ``eval()`` is
torch's BatchNorm on the running statistics, or with ``alpha`` its mixture with the example's own (layers/weighed.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.affine import per_channel
from ..core.moments import Moments, bessel, compute_dtype, moments, pool, update_running_
from ..core.ranks import Whole, pool_ranks
from ..core.step import measure, normalise_by
from ..core.tensors import finite
from ..errors import AnybatchError
from .checks import check_input
from .fused import keep_tail
from .options import check_flag, check_number
from .replay import Replay, first_run
from .surroundings import Surroundings
from .synced import SyncedLayer

__all__ = ["TORCH_BATCH_NORMS", "NormLayer"]

TORCH_BATCH_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class NormLayer(SyncedLayer):
    """A layer that replaces torch's BatchNorm under the same names.

    A method defines :meth:`normalise`, what training does, and what of the other methods differs from BatchNorm.

    Args:
        num_features: C, the channels (dim 1 of the input).
        eps: added to the variance, inside the square root.
        momentum: torch's: the weight of the new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has a weight (gamma).
        track_running_stats: whether it keeps running statistics; without them evaluation uses the batch's own.
        bias: whether an affine layer has a bias (beta).
        options: the method's own, by name: attributes of the layer, and what repr shows besides.

    State: weight (C,), bias (C,), running_mean (C,), running_var (C,), num_batches_tracked (), as torch's BatchNorm.
    """

    # What weight decay pulls the layer's own parameters towards; None leaves a parameter without decay.
    decays_to: ClassVar[Mapping[str, float | None]] = {"weight": 1.0, "bias": 0.0}
    # What the state_dict has besides BatchNorm's names, and what of those has another shape than BatchNorm's.
    adds: ClassVar[tuple[str, ...]] = ()
    reshapes: ClassVar[tuple[str, ...]] = ()
    # Whether training has moments to normalise one value a channel by; else it is normalised by the running ones.
    takes_single_values: ClassVar[bool] = False
    can_weigh: bool = True  # whether evaluation can mix the example's own moments into the running ones
    repeatable: ClassVar[bool] = True  # whether training gives the same again if the first time was not taken in
    uses_running: ClassVar[bool] = True  # whether the running statistics are for anything

    rows_per_example: int = 1  # of an input, of those the model was given: 512 in a head over 512 regions an image
    dims: int = 0  # spatial dimensions an input must have; 0: the first one settles it
    alpha: float = 0.0  # the share of the example's own moments in evaluation
    options: dict[str, Any]
    fused: type[_BatchNorm] | None = None  # the class that it replaces, if that calls an activation (layers/fused.py)
    drop: nn.Module
    act: nn.Module

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
        self.check_options(**options)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        # Not kept among the options: they may be set later.
        self.alpha, self.sync = options.pop("alpha", 0.0), options.pop("sync", False)
        self.options = options
        self._replay = Replay()
        for option, value in options.items():
            setattr(self, option, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no runs of this layer to repeat."""
        return {**super().__getstate__(), "_replay": Replay()}

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range.

        Raises:
            AnybatchError: naming the option, its value and what it may be.
        """
        check_flag(cls.__name__, "sync", options.get("sync", False))
        if "alpha" in options:
            check_number(cls.__name__, "alpha", options["alpha"], 0, 1)

    @classmethod
    def replacing(cls, bn: _BatchNorm, **options: Any) -> Self:
        """A layer in the place of ``bn``: the same Parameter and buffer objects, eps, momentum and mode."""
        layer = cls(bn.num_features, eps=bn.eps, momentum=bn.momentum, affine=False, device="meta", **options)
        _take_over(bn.to_batchnorm() if isinstance(bn, NormLayer) else bn, layer)
        known = [d for d, torch_class in TORCH_BATCH_NORMS.items() if isinstance(bn, torch_class)]
        layer.dims = known[0] if known else getattr(bn, "dims", 0)
        layer.rows_per_example = getattr(bn, "rows_per_example", 1)
        keep_tail(bn, layer)
        return layer

    def to_batchnorm(self) -> _BatchNorm:
        """Torch's plain BatchNorm in this layer's place: the same Parameter and, where they fit, buffer objects."""
        bn = TORCH_BATCH_NORMS.get(self.dims, nn.BatchNorm2d)(self.num_features, self.eps, self.momentum, device="meta")
        _take_over(self, bn)
        bn._parameters = {name: self._parameters.get(name) for name in ("weight", "bias")}
        channel = self.channel_moments()
        if channel is not None:
            bn.running_mean, bn.running_var = channel
        keep_tail(self, bn)
        return bn

    def meet(self, around: Surroundings) -> None:
        """Take note of where the converter found the norm to stand."""

    @property
    def note(self) -> str:
        """What the converter's report says of the layer besides."""
        return ""

    def normalise(self, y: Tensor) -> Tensor:
        """What training does with a batch that has values; running statistics included."""
        raise NotImplementedError

    def statistics(self, y: Tensor) -> Moments:
        """The moments of ``y`` that the running statistics are averages of."""
        return moments(y)

    def channel_moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance (C,) by which evaluation normalises without ``alpha``; None where none are kept."""
        if self.running_mean is None or self.running_var is None:
            return None
        return self.running_mean, self.running_var

    def example_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """An example's own moments (or a batch's, N = 1), as used in evaluation, from those of its channels (N, C)."""
        return mean, var

    @property
    def foldable(self) -> bool:
        """Whether evaluation is one scale and shift a channel, the same for every example."""
        return not self.alpha and self.channel_moments() is not None

    def check(self, y: Tensor) -> None:
        """Refuse an input the layer cannot normalise; the first settles the number of dimensions."""
        check_input(type(self).__name__, y, self.num_features, self.dims, self.weight, self.running_mean)
        self.dims = self.dims or max(1, y.dim() - 2)

    def forward(self, y: Tensor) -> Tensor:
        """Normalise ``y`` (N, C, *); in training also take its moments into the running statistics."""
        self.check(y)
        # One value a channel has no variance.
        single = y.numel() == self.num_features and not self.takes_single_values and self.running_mean is not None
        if self.training and self.group is not None:
            out = self.in_full_precision(y)  # whatever it is: the other ranks wait
        elif not self.training or single:
            out = self.infer(y)
        else:
            out = self.in_full_precision(y) if y.numel() else self.pass_empty(y)
        return out if self.fused is None else self.act(self.drop(out))

    def in_full_precision(self, y: Tensor) -> Tensor:
        """:meth:`normalise` out of autocast's reach: statistics are float32 or better."""
        if not torch.is_autocast_enabled(y.device.type):
            return self.normalise(y)
        with torch.autocast(y.device.type, enabled=False):
            return self.normalise(y)

    def infer(self, y: Tensor) -> Tensor:
        """Evaluation: by the running statistics, weighed with the example's own; by the batch's where none are kept."""
        channel = self.channel_moments()
        if y.numel() == 0:
            return self.pass_empty(y)
        if channel is not None and not self.alpha:
            if torch.is_grad_enabled() and y.requires_grad:
                # Kept for the backward, until which a second forward may write to the buffers (as DDP's do).
                channel = channel[0].clone(), channel[1].clone()
            # FSDP's mixed precision casts parameters, and no buffers.
            weight, bias = (p if p is None else p.to(channel[0].dtype) for p in (self.weight, self.bias))
            return F.batch_norm(y, *channel, weight, bias, False, 0.0, self.eps)
        with torch.autocast(y.device.type, enabled=False):
            y, mean, var = measure(y, by_example=channel is not None)
            return normalise_by(y, *self.evaluated(mean, var), self.weight, self.bias, self.eps)

    def evaluated(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What evaluation normalises an example (or a batch, N = 1) by whose own moments are (N, C)."""
        own, channel = self.example_moments(mean, var), self.channel_moments()
        if channel is None:
            return own
        return self.weigh(own, channel) if self.alpha else channel

    def whole(self, mean: Tensor, var: Tensor, y: Tensor, size: int | None = None) -> Whole:
        """Moments of ``y``, of ``size`` values each, pooled over the ranks where ``sync`` says so; differentiable.

        One value alone has no variance: it gets those of evaluation, if the method has no moments to pool it with.
        """
        size = y.numel() // self.num_features if size is None else size
        batch = pool_ranks(mean, var, size, len(y), self.group)
        if self.takes_single_values or self.running_mean is None or not isinstance(batch.size, Tensor):
            return batch
        alone, instead = batch.size < 2, self.evaluated(batch.mean, batch.var)
        mean, var = (torch.where(alone, a.to(b.dtype), b) for a, b in zip(instead, batch[:2], strict=True))
        return batch._replace(mean=mean, var=var)

    def weigh(self, own: tuple[Tensor, Tensor], channel: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Moments of each example (N, C), pooled with the running ones (C,) by ``alpha``."""
        means, variances = (torch.stack([b.to(a.dtype).expand_as(a), a], -1) for a, b in zip(own, channel, strict=True))
        return pool(means, variances, means.new_tensor([1 - self.alpha, self.alpha]))

    def pass_empty(self, y: Tensor) -> Tensor:
        """An empty batch through the affine part, so that every parameter still gets its (zero) gradient."""
        out = y
        for p in self._parameters.values():
            out = out if p is None else out + per_channel(p, y)
        return out.to(y.dtype)

    @torch.no_grad()
    def track_(
        self,
        now: Moments,
        examples: float | Tensor,
        ok: Tensor | bool | None = None,
        total: bool = False,
        momentum_batch: int | None = None,
    ) -> None:
        """Take a batch's moments into the running statistics; a second run under a checkpoint takes nothing.

        Args:
            now: of the batch, in the shape of the running statistics; or of some of one size, one dimension before it.
            examples: in the batch.
            ok: a bool, on the device if need be: False leaves all as it is. By default whether the moments are finite.
            total: running_var is the total population variance; else torch's average of Bessel variances.
            momentum_batch: examples at which ``momentum`` is torch's; None: every forward counts the same.
        """
        if not self.track_running_stats or self.running_mean is None or Replay.is_second_run():
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if now.mean.dim() > 1 and self.momentum is None:  # the rates differ
            for mean, var in zip(now.mean, now.var, strict=True):
                self.track_(Moments(mean, var, now.size), examples, ok, total, momentum_batch)
            return
        if ok is None:
            ok = finite(now.mean + now.var)
            ok = ok & (now.size > 1) if isinstance(now.size, Tensor) else ok
            ok = first_run(ok, self.repeatable) if isinstance(ok, Tensor) else ok
        self.num_batches_tracked.add_(ok * (len(now.mean) if now.mean.dim() > 1 else 1))
        rate: Tensor | float
        if self.momentum is None:
            rate = 1 / self.num_batches_tracked.clamp_min(1).to(compute_dtype(self.running_mean.dtype))
        elif momentum_batch is None:
            rate = self.momentum
        else:
            full = examples / momentum_batch
            rate = 1 - (1 - self.momentum) ** (full.clamp_max(1) if isinstance(full, Tensor) else min(1.0, full))
            least = 4 * torch.finfo(self.running_mean.dtype).eps  # bfloat16's would stand still
            rate = rate.clamp_min(least) if isinstance(rate, Tensor) else max(rate, least)
        var = now.var if total else bessel(now.var, now.size)
        update_running_(self.running_mean, self.running_var, now.mean, var, rate, total, ok)

    def extra_repr(self) -> str:
        """The constructor's arguments, so that repr(layer) evaluates to an equal layer."""
        own: dict[str, Any] = {"eps": self.eps, "momentum": self.momentum}
        if self.bias is None:
            own["bias" if self.affine else "affine"] = False
        if not self.track_running_stats:
            own["track_running_stats"] = False
        if self.alpha:
            own["alpha"] = self.alpha
        if self.sync:
            own["sync"] = True
        return ", ".join([str(self.num_features), *(f"{k}={v!r}" for k, v in {**own, **self.options}.items())])


def _take_over(source: _BatchNorm, target: _BatchNorm) -> None:
    target._parameters = dict(source._parameters)
    target._buffers = dict(source._buffers)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    target.affine, target.track_running_stats = source.affine, source.track_running_stats
    target.training = source.training
