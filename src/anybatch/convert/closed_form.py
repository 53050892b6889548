"""Does a linear map explain what a norm saw?  The test every pair must pass before anything may rely on it.

For y = W p + b, whatever the map's stride, groups or padding:

    E[y] = <E[p], W> + b        var(y) = <E[(y - E[y]) p], W>
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.linear_map import LinearMap
from ..core.moments import moments

__all__ = ["mismatch", "scales_with_weight", "unsteady"]

# Far above rounding and TF32's averaged-out error, far below what standardised weights or another padding change.
_RELATIVE = 1e-3
_OF_SUMMANDS = 1e-5
_FLOOR = 1e-29  # of a variance, beside values of size 1: that of a dead channel is taken for up to 1e-30

_UNEXPLAINED = "its input is not what the map's own weight gives (standardised weight, own padding, changed in place?)"


def mismatch(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """Compare the moments of y with those that the map's closed forms give for its input x.

    Args:
        module: the map, read for its effective weight and bias.
        x: what the map was called on.
        y: what the norm was called on.

    Returns:
        Why the map does not explain y; empty when it does, and on the meta device, where there is nothing to compare.
    """
    if y.is_meta:
        return ""
    linear, weight, bias = LinearMap.of(module), module.weight, module.bias
    assert linear is not None
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if y.dim() != weight.dim() or y.shape[1] != linear.rows_shape(weight)[0]:
        return f"its channels are not the map's output channels (input of shape {tuple(y.shape)})"
    if not torch.isfinite(y).all():
        return "its input was not finite in the example run"
    try:
        return "" if _explains(linear, x, y, weight, bias) else _UNEXPLAINED
    except IndexError:  # more output positions than the map's own padding gives
        return _UNEXPLAINED
    except (RuntimeError, ValueError) as error:
        return f"the map's closed form cannot be had: {str(error).splitlines()[0]}"


def _explains(linear: LinearMap, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    rounding = 4 * max(torch.finfo(t.dtype).eps for t in (x, y))
    # In float64 where there is one: at mean 1e4 the sums below would cancel.
    dtype = torch.float32 if y.device.type == "mps" else torch.float64
    x, y, rows = x.to(dtype), y.to(dtype), linear.rows(weight).to(dtype)
    # Deep in a network before training a channel may hold 1e-15, whose square is as small as the floor.
    size = y.abs().amax([0, *range(2, y.dim())])
    size = torch.where(size > 0, size, 1)
    y, rows = y / size.view(-1, *[1] * (y.dim() - 2)), rows / size.view(-1, 1)
    seen = moments(y)
    patch = linear.mean_patch(x, tuple(y.shape[2:])).repeat_interleave(len(rows) // linear.groups, 0)
    shift = torch.zeros_like(seen.mean) if bias is None else bias.to(dtype) / size
    mean = (patch * rows).sum(1) + shift
    var = (linear.covariance(x, y - seen.mean.view(-1, *[1] * (y.dim() - 2)), weight) * rows).sum(1)

    # Where large summands cancel, the error follows them and not the result.
    relative, of_summands = max(_RELATIVE, rounding), max(_OF_SUMMANDS, rounding)
    summands, std = (patch * rows).abs().sum(1) + shift.abs(), seen.var.sqrt()
    near_mean = (mean - seen.mean).abs() <= relative * std + of_summands * summands
    near_var = (var - seen.var).abs() <= relative * seen.var + of_summands * std * (summands + std) + _FLOOR
    return bool((near_mean & near_var).all())


@torch.no_grad()
def scales_with_weight(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the map's rows and bias, scaled and shifted, scale and shift its output, whatever its forward does to x.

    Then a norm can be folded into a map that no closed form explains, one that pads by itself. A weight that the map
    standardises does not pass.

    Args:
        module: the map; as before afterwards.
        x: what it was called on.
        y: what it put out.
    """
    linear, own = LinearMap.of(module), module._parameters
    if linear is None or linear.transposed or not {"weight", "bias"} <= own.keys() or y.is_meta:
        return False
    weight, bias = own["weight"], own["bias"]
    if weight is None or weight.dim() != y.dim():
        return False
    channels = torch.linspace(0.5, 2, len(weight), device=y.device, dtype=y.dtype)
    scale, shift = channels.roll(1), channels * y.abs().mean()
    wide, whole = (1, -1, *[1] * (y.dim() - 2)), (-1, *[1] * (weight.dim() - 1))
    try:
        own["weight"] = nn.Parameter(weight * scale.view(whole).to(weight.dtype))
        own["bias"] = nn.Parameter((shift if bias is None else scale * bias + shift).to(weight.dtype))
        ours = module.forward(x)
    finally:
        own["weight"], own["bias"] = weight, bias
    expected = scale.view(wide) * y + shift.view(wide)
    near = max(_RELATIVE, 4 * torch.finfo(y.dtype).eps) * expected.abs().amax([0, *range(2, y.dim())], keepdim=True)
    return ours.shape == y.shape and bool(((ours - expected).abs() <= near).all())


def unsteady(module: nn.Module) -> bool:
    """Whether reading the map's weight in training changes it, as spectral_norm's power iteration does.

    Without a cache around both, such a weight cannot be had beside the map's forward: the answer is not the weight that
    makes the output. The probe may move the parametrization's buffers; the caller restores them.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return False
    rules = module.parametrizations
    assert isinstance(rules, nn.ModuleDict)
    rule = rules["weight"]
    modes = [(part, part.training) for part in rule.modules()]
    before = [buffer._version for buffer in rule.buffers()]
    rule.train()
    first, second = module.weight, module.weight
    for part, training in modes:
        part.training = training
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return before != [buffer._version for buffer in rule.buffers()] or not torch.equal(first, second)
