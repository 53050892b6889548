"""Proxy Norm (Labatie, Masters, Eaton-Rosen, Luschi; NeurIPS 2021; arXiv 2106.03743).

Per example, over all channels ('layer') or over each of ``groups`` of them ('group'), and over positions:

    Y = (y - mean) / sqrt(var + eps)                                      population variance
    z = ( act(gamma Y + beta) - mu_P ) / sqrt( var_P + proxy_eps )
    mu_P, var_P = mean and variance of act(gamma P + beta),   P ~ Normal(beta', (1 + gamma')^2),   per channel

act is the model's own activation. The proxy P stands for Y as it would be were each channel normal; what a channel's
gamma, beta and act do to its mean and variance is divided out without asking other examples. Training is evaluation: no
running statistics. The moments of act(gamma P + beta) are taken over ``points`` quantiles of the normal distribution,
sqrt(2) erfinv(2 (i + 1/2) / n - 1), or by Gauss-Hermite quadrature, in float32 or better.

A norm that no activation follows is gamma Y: scale only, its beta is unused.

How the layer gets behind the activation: layers/awaiting.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.moments import compute_dtype, pool
from ..core.quadrature import QUADRATURES, standard_normal
from ..core.step import normalise_by
from ..core.tensors import version
from .awaiting import Activation, await_activation
from .base import NormLayer
from .config import NormConfig
from .options import check_choice, check_divides, check_number, check_whole
from .surroundings import ACTIVATIONS, Surroundings

__all__ = ["ProxyNorm", "ProxyNormalization"]


class ProxyNormalization(NormLayer):
    """Normalises (N, C, *) per example over channels and positions, and the activation's output by a proxy's moments.

    z = (act(gamma Y + beta) - mu_P) / sqrt(var_P + proxy_eps), the equations at the top of this file. With an
    ``activation`` the layer's output is to be given to that function next, which returns z; without one it is gamma Y.

    Args:
        num_features: C.
        activation: the elementwise function of torch that follows, by name ('relu', 'silu', ...); '' for none.
        eps: added to the variance of y, inside the square root.
        momentum: kept for torch's BatchNorm; unused.
        affine: whether the layer has gamma and beta.
        track_running_stats: whether it keeps torch's running statistics, under their names; unused.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether an affine layer has beta.
        base: 'layer' (moments over all channels of an example) or 'group'.
        groups: of channels, for base 'group'; it divides C.
        quadrature: 'quantiles' (the authors') or 'gauss-hermite', for the proxy's moments.
        points: of the quadrature.
        proxy_eps: added to the proxy's variance, inside the square root.

    Shape: (N, C, *) -> (N, C, *).

    State: torch's BatchNorm's, the running statistics as they were; with an activation proxy_weight (C,), gamma', and
        proxy_bias (C,), beta', both zero at first.

    Raises:
        AnybatchError: an option out of its range, groups that do not divide C, an input that does not fit the layer, or
            an output that goes elsewhere than to the activation.

    Source: the paper; its authors' code for 0.03 and the 200 quantiles.
    """

    decays_to: ClassVar[Mapping[str, float | None]] = {
        "weight": None,
        "bias": None,
        "proxy_weight": 0.0,
        "proxy_bias": 0.0,
    }
    adds = ("proxy_weight", "proxy_bias")
    can_weigh = False
    uses_running = False
    takes_single_values = True  # of a channel: an example has others
    called = True  # by the converter's example run
    activation: str
    base: str
    groups: int
    quadrature: str
    points: int
    proxy_eps: float
    proxy_weight: nn.Parameter
    proxy_bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        activation: str = "",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        base: Literal["layer", "group"] = "layer",
        groups: int = 32,
        quadrature: Literal["quantiles", "gauss-hermite"] = "quantiles",
        points: int = 200,
        proxy_eps: float = 0.03,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            activation=activation,
            base=base,
            groups=groups,
            quadrature=quadrature,
            points=points,
            proxy_eps=proxy_eps,
        )
        if base == "group":
            check_divides("ProxyNorm", "groups", groups, num_features)
        self._quadrature = standard_normal(quadrature, points, torch.float64, torch.device("cpu"))
        self._cache: tuple[list[Any], tuple[Tensor, Tensor]] | None = None
        if activation:
            self._make_proxy(device, dtype)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuse options out of range."""
        if options.get("activation"):
            check_choice("ProxyNorm", "activation", options["activation"], ("", *sorted(ACTIVATIONS)))
        check_choice("ProxyNorm", "base", options["base"], ("layer", "group"))
        check_choice("ProxyNorm", "quadrature", options["quadrature"], QUADRATURES)
        check_whole("ProxyNorm", "groups", options["groups"])
        check_whole("ProxyNorm", "points", options["points"], least=2)
        check_number("ProxyNorm", "proxy_eps", options["proxy_eps"], 0)

    def _make_proxy(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for name in self.adds:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.num_features, device=device, dtype=dtype)))

    def meet(self, around: Surroundings) -> None:
        """Expect the activation that the converter found."""
        self.called = around.called
        self.activation = self.options["activation"] = around.activation
        if self.activation:
            like = self.weight if self.weight is not None else self.running_mean
            self._make_proxy(getattr(like, "device", None), getattr(like, "dtype", None))

    @property
    def note(self) -> str:
        """The activation."""
        if self.activation:
            return f"then {self.activation}"
        why = "no activation after it" if self.called else "the example run never called it"
        return f"{why}: scale only, its bias is unused"

    @property
    def foldable(self) -> bool:
        """False: the moments are each example's own."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compute the proxy's moments anew."""
        return {**super().__getstate__(), "_cache": None}

    def train(self, mode: bool = True) -> "ProxyNormalization":
        """As torch's; the proxy's moments are computed anew."""
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def in_full_precision(self, y: Tensor) -> Tensor:
        """:meth:`normalise`, awaiting the activation."""
        return self._awaiting(super().in_full_precision(y))

    def normalise(self, y: Tensor) -> Tensor:
        """Gamma Y + beta; gamma Y where no activation follows."""
        weight, bias = (None if p is None else p.to(compute_dtype(y.dtype)) for p in (self.weight, self.bias))
        if bias is not None and not self.activation:
            bias = 0 * bias  # unused, but not without a gradient: DistributedDataParallel asks for one
        groups = self.groups if self.base == "group" else 1
        return torch.group_norm(y.to(compute_dtype(y.dtype)), groups, weight, bias, self.eps).to(y.dtype)

    def infer(self, y: Tensor) -> Tensor:
        """As in training."""
        return self.in_full_precision(y) if y.numel() else self.pass_empty(y)

    def pass_empty(self, y: Tensor) -> Tensor:
        """An empty batch through the affine part, awaiting the activation."""
        return self._awaiting(super().pass_empty(y))

    def _awaiting(self, u: Tensor) -> Tensor:
        return await_activation(u, self) if self.activation else u

    def activated(self, out: Tensor, activation: Activation) -> Tensor:
        """Z, where ``out`` is act(gamma Y + beta)."""
        if not out.numel():
            return out
        with torch.autocast(out.device.type, enabled=False):
            mean, var = self._remembered(activation, out.dim())
            return normalise_by(out, mean[None], var[None], None, None, self.proxy_eps)

    def _remembered(self, activation: Activation, dims: int) -> tuple[Tensor, Tensor]:
        """:meth:`proxy_moments`, in evaluation without gradients once until a parameter or the activation changes."""
        if torch.compiler.is_compiling():
            return self.proxy_moments(activation, dims)
        func, args, kwargs = activation
        called = [func, dims, torch.is_inference_mode_enabled(), *args, *kwargs, *kwargs.values()]
        used = [*called, *self._parameters.values()]
        tensors = [t for t in used if isinstance(t, Tensor)]
        # Tensors made in inference mode do not tell when they are changed.
        if self.training or torch.is_grad_enabled() or any(t.is_inference() for t in tensors):
            return self.proxy_moments(activation, dims)
        key = [*used, *map(version, tensors)]
        if self._cache is None or not _same(self._cache[0], key):
            self._cache = key, self.proxy_moments(activation, dims)
        return self._cache[1]

    def proxy_moments(self, activation: Activation, dims: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) of act(gamma P + beta), laid out as an input of the layer with ``dims`` dimensions."""
        dtype = compute_dtype(self.proxy_weight.dtype)
        nodes, shares = self._standard_normal(dtype, self.proxy_weight.device)
        scale, shift = 1 + self.proxy_weight.to(dtype), self.proxy_bias.to(dtype)
        if self.weight is not None:
            scale, shift = scale * self.weight.to(dtype), shift * self.weight.to(dtype)
        if self.bias is not None:
            shift = shift + self.bias.to(dtype)
        p = torch.addcmul(shift, nodes[:, None], scale)
        values = activation(p.view(len(nodes), -1, *[1] * (dims - 2))).flatten(1).t()
        return pool(values, values.new_zeros(()), shares)

    def _standard_normal(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # constants of the graph, which could not look them up, or has no erfinv
            nodes, shares = self._quadrature
            return nodes.to(device, dtype), shares.to(device, dtype)
        return standard_normal(self.quadrature, self.points, dtype, device)


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether the same tensors and equal other things."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        x is y or (not isinstance(x, Tensor) and type(x) is type(y) and x == y) for x, y in pairs
    )


@dataclass(frozen=True)
class ProxyNorm(NormConfig):
    """Proxy Norm after a layer norm or group norm; options as in :class:`anybatch.nn.ProxyNormalization`.

    Args:
        base: 'layer' or 'group', what the input is normalised by.
        groups: of channels, for base 'group'; it divides the channels of every norm.
        quadrature: 'quantiles' or 'gauss-hermite'.
        points: of the quadrature.
        proxy_eps: added to the proxy's variance, inside the square root.
    """

    layer: ClassVar[type[NormLayer]] = ProxyNormalization

    base: Literal["layer", "group"] = "layer"
    groups: int = 32
    quadrature: Literal["quantiles", "gauss-hermite"] = "quantiles"
    points: int = 200
    proxy_eps: float = 0.03

    @property
    def needs_flow(self) -> bool:
        """True: the layer has to know its activation."""
        return True

    def in_groups(self, examples: int) -> "ProxyNorm":
        """Itself: it sees one example at a time."""
        return self
