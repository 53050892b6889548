"""Instance Enhancement Batch Normalization (Liang, Huang, Liang, Yang; AAAI 2020; arXiv 1908.04008).

For each example n and channel c of the input x (N, C, *), E over positions alone:

    s_nc  = sigmoid(g_hat_c * E[x_nc] + b_hat_c)
    y_hat = (x - mean) / sqrt(var + eps)              BatchNorm's, moments over (N, *)
    out   = y_hat * (gamma * s) + beta

g_hat and b_hat are parameters (C,), ``gate_weight`` and ``gate_bias``, 0 and -1 at first: every gate is then
sigmoid(-1). var is the population variance, eps is inside the root, running statistics follow torch's rule once a
training forward. Evaluation has the same gate over the running statistics: one scale an example, so it does not fold.
The authors leave the norms of shortcuts plain, and so does the config.

Ours: with a window of several batches y_hat is that of Cross-Iteration BatchNorm without its affine part (cbn.py), and
the gate stays what it is, for it needs one example alone. With ``examples_per_group`` mean and var are those of so many
consecutive examples, and a batch is what as many batches of these are, one after another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.affine import per_channel
from ..core.groups import moments_of_ghosts, pool_batch, pool_examples
from ..core.moments import position_mean
from ..core.step import measure, normalise_by
from .base import NormLayer
from .cbn import CBN, CrossIterationBatchNorm
from .config import NormConfig
from .ghost import GhostBN
from .options import check_choice, check_flag, check_groups, check_whole
from .surroundings import Surroundings
from .torch_own import BN
from .weighed import ExampleWeighedBN

__all__ = ["IEBN", "InstanceEnhancementBatchNorm", "InstanceEnhancementCrossIterationBatchNorm"]

_GATE = {"gate_weight": 0.0, "gate_bias": -1.0}


class _Gated(NormLayer):
    """A gate for each example and channel on what a norm gives."""

    adds = tuple(_GATE)
    decays_to: ClassVar[Mapping[str, float | None]] = {**NormLayer.decays_to, **dict.fromkeys(_GATE)}
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_gate(torch.empty(0, device=kwargs.get("device"), dtype=kwargs.get("dtype")))

    @classmethod
    def replacing(cls, bn: _BatchNorm, **options: Any) -> Self:
        """A layer in the place of ``bn``, its gate that of ``bn`` if it has one."""
        layer = super().replacing(bn, **options)
        layer._add_gate(torch.empty(0))
        if isinstance(bn, _Gated):
            layer.gate_weight, layer.gate_bias = bn.gate_weight, bn.gate_bias
        return layer

    def _add_gate(self, like: Tensor) -> None:
        """A new gate, where weight and running statistics are; like the given tensor if there are none."""
        like = next((t for t in (self.weight, self.running_mean) if t is not None), like)
        for name, value in _GATE.items():
            self.register_parameter(name, nn.Parameter(like.new_full((self.num_features,), value)))

    def gain(self, mean: Tensor) -> Tensor:
        """Gamma * s (N, C), from the means (N, C) of the input over its positions."""
        gate = torch.sigmoid(torch.addcmul(self.gate_bias.to(mean.dtype), self.gate_weight.to(mean.dtype), mean))
        return gate if self.weight is None else gate * self.weight.to(mean.dtype)

    def infer(self, y: Tensor) -> Tensor:
        """The gate over the running statistics, weighed by ``alpha``; over the batch's own where none are kept."""
        if y.numel() == 0:
            return self.pass_empty(y)
        channel = self.channel_moments()
        with torch.autocast(y.device.type, enabled=False):
            if channel is None or self.alpha:
                y, mean, var = measure(y, by_example=True)
                by = pool_batch(mean, var) if channel is None else self.weigh((mean, var), channel)
            else:
                mean = position_mean(y)
                by = channel[0].to(mean.dtype), channel[1].to(mean.dtype)
            return normalise_by(y, *by, self.gain(mean), self.bias, self.eps)

    @property
    def foldable(self) -> bool:
        """Never: the scale is the example's own."""
        return False


class InstanceEnhancementBatchNorm(_Gated):
    """BatchNorm over (N, *), its scale gated for each example and channel by the input's mean over positions.

    out = y_hat * (gamma * s) + beta, s = sigmoid(g_hat * E[x] + b_hat), the equations at the top of this file.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: torch's, the weight of a new batch in the running statistics; None for a cumulative average.
        affine: whether the layer has gamma and beta; the gate it has in any case.
        track_running_stats: as in torch.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
        bias: whether an affine layer has beta.
        alpha: the share of the example's own moments in evaluation.
        examples_per_group: take a batch so many examples at a time, running statistics included; None for all.
        sync: pool the batch's moments over the ranks of ``process_group`` (an attribute; torch's default group).

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's, and the parameters gate_weight (C,), 0 at first, and gate_bias (C,), -1 at first.

    Raises:
        AnybatchError: an option out of its range, or an input that does not fit the layer.

    Source: arXiv 1908.04008 and its code.
    """

    examples_per_group: int | None

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
        alpha: float = 0.0,
        examples_per_group: int | None = None,
        sync: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            device=device,
            dtype=dtype,
            bias=bias,
            alpha=alpha,
            examples_per_group=examples_per_group,
            sync=sync,
        )

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        super().check_options(**options)
        check_groups("IEBN", options["examples_per_group"], options["sync"])

    def normalise(self, y: Tensor) -> Tensor:
        """By the batch's moments, or its groups', pooled from the examples' own, whose means open the gate."""
        y, mean, var = measure(y, by_example=len(y) > 0)
        gain, size = self.gain(mean), self.examples_per_group
        if size is not None and size < len(y):
            groups = pool_examples(mean, var, size)
            for now, examples in moments_of_ghosts(*groups, size, y.numel() // mean.numel()):
                self.track_(now, examples)
            return normalise_by(y, *groups, gain, self.bias, self.eps)
        batch = self.whole(*pool_batch(mean, var), y)
        self.track_(batch.now, batch.examples)
        return normalise_by(y, batch.mean, batch.var, gain, self.bias, self.eps)


class InstanceEnhancementCrossIterationBatchNorm(_Gated, CrossIterationBatchNorm):
    """Cross-Iteration BatchNorm, its scale gated for each example and channel by the input's mean over positions.

    out = y_hat * (gamma * s) + beta, s = sigmoid(g_hat * E[x] + b_hat), with CBN's y_hat.

    Args:
        args: as in :class:`CrossIterationBatchNorm`.
        kwargs: likewise; device and dtype are given by name.

    Shape: (N, C, *) -> (N, C, *).

    State: as in :class:`CrossIterationBatchNorm`, and the parameters gate_weight (C,), 0 at first, and gate_bias (C,),
        -1 at first.

    Raises:
        AnybatchError: as in :class:`CrossIterationBatchNorm`.

    Source: arXiv 1908.04008; over CBN it is ours.
    """

    def normalise(self, y: Tensor) -> Tensor:
        """CBN without its affine part, then the gate."""
        out = self.standardise(y, None, None) * per_channel(self.gain(position_mean(y)), y)
        return (out if self.bias is None else out + per_channel(self.bias, y)).to(y.dtype)


@dataclass(frozen=True)
class IEBN(NormConfig):
    """Instance Enhancement BatchNorm, over one batch or, with a window, over CBN with its defaults.

    Args:
        shortcuts: 'plain' gives the norms of residual shortcuts no gate, as the authors do: they stay as they are, or
            with a window become CBN; 'converted' gives them one.
        window: batches pooled, the current one included; 1 is IEBN, more is
            :class:`anybatch.nn.InstanceEnhancementCrossIterationBatchNorm`.
        sync: pool moments over ranks.
        examples_per_group: take a batch so many examples at a time, as batches of their own; None for all.
    """

    layer: ClassVar[type[NormLayer]] = InstanceEnhancementBatchNorm

    shortcuts: Literal["plain", "converted"] = "plain"
    window: int = 1
    sync: bool = False
    examples_per_group: int | None = None

    def __post_init__(self) -> None:
        check_choice("IEBN", "shortcuts", self.shortcuts, ("plain", "converted"))
        check_whole("IEBN", "window", self.window)
        check_flag("IEBN", "sync", self.sync)
        check_groups("IEBN", self.examples_per_group, self.sync)

    @property
    def _plain(self) -> NormConfig:
        """The same without a gate."""
        if self.window > 1:
            return CBN(window=self.window, examples_per_group=self.examples_per_group, sync=self.sync)
        if self.examples_per_group:
            return GhostBN(self.examples_per_group, "ghosts")
        return ExampleWeighedBN(alpha=0.0, sync=True) if self.sync else BN()

    def build(self, bn: _BatchNorm) -> nn.Module:
        """The layer in place of ``bn``, with a gate."""
        options = {"examples_per_group": self.examples_per_group, "sync": self.sync}
        if self.window == 1:
            return InstanceEnhancementBatchNorm.replacing(bn, **options)
        return InstanceEnhancementCrossIterationBatchNorm.replacing(bn, window=self.window, **options)

    def in_groups(self, examples: int) -> "IEBN | None":
        """With ``examples_per_group``, where it is the same without a gate."""
        one_by_one = self.examples_per_group or self._plain.in_groups(examples) is None
        return None if one_by_one else replace(self, examples_per_group=examples)

    @property
    def needs_map(self) -> bool:
        """True over CBN, which compensates past moments."""
        return self.window > 1

    @property
    def needs_flow(self) -> bool:
        """True where shortcuts stay plain."""
        return self.shortcuts == "plain"

    def at(self, around: Surroundings) -> tuple[NormConfig, str]:
        """The norms of shortcuts have no gate, where those stay plain: BatchNorm, or CBN with a window."""
        if not around.shortcut or self.shortcuts == "converted":
            return self, ""
        return self._plain, f"the norm of a shortcut: {'CBN' if self.window > 1 else 'BN'}, without a gate"
