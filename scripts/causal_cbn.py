"""CBN of all micro-batches of a step at once, for experiments on it.

Between two steps of the optimizer the weights stand still. So what CBN computes for the micro-batches of a step, one
after another, is one batch with causal pooling, which is several times as fast at one image, and open to changes that
the layer has no place for. Row g of the matrix A says what micro-batch g is normalised by: column 0 is the past,
carried to today's weights, the others are the step's micro-batches. With R averages of E[g], E[g y_hat] by rows of B,

    mean_g = sum_j A_gj mean_j,     var_g = sum_j A_gj (var_j + mean_j^2) - mean_g^2
    to the weights:         through every mean_j, var_j, the past's by P and D
    to earlier layers:      a (g - R1 - y_hat R2),  R = A_gg (its own) + (1 - A_gg) sum_j B_gj (theirs)

Without options it is the layer with all positions read: tests/test_explore_cbn.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

D = torch.float64


@dataclass(frozen=True)
class Way:
    """One way to pool.

    Attributes:
        examples: pooled, N; 0: the step's own, all of them, as BatchNorm on the whole step.
        reductions: examples that the reductions are averaged over.
        known: reductions of the whole step, the micro-batches to come included, which no layer can know.
        own: whether a micro-batch counts in what it is normalised by.
        trust: count the past for no more micro-batches than it is as good as: noise of one, squared, over that of what
            was carried, as every step measures them.
    """

    examples: int = 64
    reductions: int = 64
    known: bool = False
    own: bool = True
    trust: bool = False


@dataclass
class Past:
    """What is kept from step to step of all micro-batches: P (1, K), D (C, K), their variances, and how many."""

    patch: Tensor
    covariance: Tensor
    var: Tensor
    var_at: Tensor
    apart: Tensor  # mean less <P, W>
    count: float


@dataclass
class State:
    """Of one norm."""

    past: Past | None = None
    reductions: Tensor | None = None
    backwards: int = 0
    noise: float | None = None  # of a micro-batch's mean, and of the carried one, squared, in variances; averages
    drift: float = 0.0
    bias: list[float] = field(default_factory=list)  # carried against the step's own log variance, step by step


class CausalCBN(nn.Module):
    """A convolution and its norm over the micro-batches of ``batch`` images that a step is made of."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, batch: int, way: Way) -> None:
        super().__init__()
        self.conv, self.norm, self.batch, self.way, self.state = conv, norm, batch, way, State()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm(self.conv(x))
        return _Causal.apply(x, self.conv.weight, self.norm.weight, self.norm.bias, self)

    def pooling(self, groups: int) -> tuple[Tensor, Tensor]:
        """A (G, G + 1), and for how many micro-batches each column counts in the past that is kept (G + 1,)."""
        if not self.way.examples:
            a = torch.full((groups, groups + 1), 1 / groups, dtype=D)
            a[:, 0] = 0
            return a, a[0]
        kept = 1 - min(1.0, self.batch / self.way.examples)
        past = self.state.past
        weights = torch.zeros(groups + 1, dtype=D)
        weights[0] = 0 if past is None else past.count
        rows = []
        for g in range(groups):
            before = weights
            weights = weights * kept
            weights[g + 1] = 1
            rows.append(before if not self.way.own and before.any() else weights)
        return torch.stack([row / row.sum() for row in rows]), weights

    def trust_(self, past_mean: Tensor, past_var: Tensor, means: Tensor) -> None:
        """Limit what the past counts by how far it was off, against the step's own mean over all micro-batches."""
        past, state = self.state.past, self.state
        assert past is not None
        scale = past_var.clamp_min(1e-9)
        noise = float((means.var(0) / scale).mean())
        drift = float(((past_mean - means.mean(0)).square() / scale).mean()) - noise / len(means)
        rate = 1.0 if state.noise is None else 0.1
        state.noise = noise if state.noise is None else state.noise + rate * (noise - state.noise)
        state.drift += rate * (drift - state.drift)
        past.count = min(past.count, state.noise / max(state.drift, 1e-9))

    def averaging(self, groups: int) -> Tensor:
        """B (G, G + 1); column 0 is what the averages were before."""
        state, rows = self.state, []
        weights = torch.zeros(groups + 1, dtype=D)
        weights[0] = float(state.backwards > 0)
        for g in range(groups):
            state.backwards += 1
            rate = 1 / min(state.backwards, max(1.0, self.way.reductions / self.batch))
            weights = weights * (1 - rate)
            weights[g + 1] = rate
            rows.append(weights)
        return torch.stack(rows)

    def track_(self, means: Tensor, variances: Tensor) -> None:
        """The step's moments into the running statistics, at torch's momentum."""
        norm, rate = self.norm, self.norm.momentum
        var, apart = variances.mean(0) + means.var(0, correction=0), means.mean(0) - norm.running_mean
        norm.running_var.mul_(1 - rate).add_(rate * var).add_(rate * (1 - rate) * apart.square())
        norm.running_mean.add_(rate * apart)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, layer: CausalCBN) -> Tensor:
        conv, state = layer.conv, layer.state
        y = F.conv2d(x, weight, None, conv.stride, conv.padding)
        grouped = y.view(-1, layer.batch, *y.shape[1:])  # (G, b, C, H, W)
        groups, n = len(grouped), layer.batch * y[0, 0].numel()
        means, variances = grouped.mean((1, 3, 4)), grouped.var((1, 3, 4), correction=0)
        past, rows = state.past, weight.flatten(1)
        origin = means.mean(0)
        past_mean, past_var, slope = origin, torch.zeros_like(origin), None
        if past is not None:
            var_at = (past.covariance * rows).sum(1)
            ratio = torch.where(past.var_at > 1e-12, var_at / past.var_at, 1.0)
            past_mean, past_var = (past.patch * rows).sum(1) + past.apart, ratio.square() * past.var
            slope = torch.where(var_at.abs() > 1e-12, past_var / var_at, 0.0)
            whole = (variances.mean(0) + means.var(0, correction=0)).clamp_min(1e-9)
            state.bias.append(float((past_var.clamp_min(1e-9).log() - whole.log()).mean()))
            if layer.way.trust:
                layer.trust_(past_mean, past_var, means)
        a, counts = layer.pooling(groups)
        all_means = torch.cat([past_mean.unsqueeze(0), means]).to(D) - origin  # small numbers: squared below
        mean = a @ all_means
        squares = torch.cat([past_var.unsqueeze(0), variances]).to(D) + all_means.square()
        var = (a @ squares - mean.square()).clamp_min(0)
        inverse = (var + layer.norm.eps).rsqrt().to(y.dtype)
        pooled = (mean + origin).to(y.dtype)
        y_hat = (grouped - _c(pooled)) * _c(inverse)
        layer.track_(means, variances)
        if layer.way.examples:
            shares = counts / counts.sum()
            kept_mean = shares @ all_means
            kept = (kept_mean + origin).to(y.dtype), (shares @ squares - kept_mean.square()).clamp_min(0).to(y.dtype)
            state.past = _renewed(past, past_mean, counts, means, kept, x, y, layer)
        ctx.layer, ctx.a, ctx.past, ctx.slope, ctx.n = layer, a, past, slope, n
        ctx.save_for_backward(x, weight, gamma, grouped, means, mean, all_means, pooled, inverse)
        return (y_hat * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)).view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, y, means, mean, all_means, pooled, inverse = ctx.saved_tensors
        layer, a, past, n = ctx.layer, ctx.a, ctx.past, ctx.n
        conv, state, way = layer.conv, layer.state, layer.way
        g = grad.reshape(y.shape)
        y_hat = (y - _c(pooled)) * _c(inverse)
        sums, sums_y = g.sum((1, 3, 4)), (g * y_hat).sum((1, 3, 4))
        scale = inverse * gamma
        by_mean, by_var = -(scale * sums).to(D), -0.5 * (scale * inverse * sums_y).to(D)
        to_var = a.t() @ by_var
        to_mean = a.t() @ by_mean + 2 * (all_means * to_var - a.t() @ (by_var * mean))
        own = g * _c(scale) + _c((to_mean[1:] / n).to(y.dtype)) + _c((2 * to_var[1:] / n).to(y.dtype)) * (y - _c(means))
        grad_weight = conv2d_weight(x, weight.shape, own.flatten(0, 1), conv.stride, conv.padding)
        if past is not None and way.examples:
            history = to_mean[0].to(y.dtype).unsqueeze(1) * past.patch
            history = history + (2 * to_var[0].to(y.dtype) * ctx.slope).unsqueeze(1) * past.covariance
            grad_weight = grad_weight + history.view_as(weight)

        reductions = torch.stack([sums / n, sums_y / n], 1).to(D)  # (G, 2, C)
        before = torch.zeros_like(reductions[:1]) if state.reductions is None else state.reductions.unsqueeze(0)
        averages = torch.einsum("gj,jkc->gkc", layer.averaging(len(y)), torch.cat([before, reductions]))
        state.reductions = averages[-1]
        share = torch.diagonal(a[:, 1:]).view(-1, 1, 1)
        through = reductions.mean(0, keepdim=True) if way.known else share * reductions + (1 - share) * averages
        through = through.to(y.dtype).expand(len(y), -1, -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            up = _c(scale) * (g - _c(through[:, 0]) - y_hat * _c(through[:, 1]))
            grad_x = conv2d_input(x.shape, weight, up.flatten(0, 1), conv.stride, conv.padding)
        return grad_x, grad_weight, sums_y.sum(0), sums.sum(0), None


def _c(per_channel: Tensor) -> Tensor:
    """(G, C), to go with (G, b, C, H, W)."""
    return per_channel[:, None, :, None, None]


def _renewed(
    past: Past | None,
    past_mean: Tensor,
    counts: Tensor,
    means: Tensor,
    kept: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    layer: CausalCBN,
) -> Past:
    """The past with the step in it, each micro-batch by its count; ``kept`` are the moments of all together."""
    conv, rows, (mean, var) = layer.conv, layer.conv.weight.detach().flatten(1), kept
    shares = (counts / counts.sum()).to(y.dtype)
    each = (shares[1:] / (layer.batch * y[0, 0].numel())).repeat_interleave(layer.batch).view(-1, 1, 1, 1)
    ones = each.expand(-1, 1, *y.shape[2:]).contiguous()
    patch = conv2d_weight(x, (1, *conv.weight.shape[1:]), ones, conv.stride, conv.padding).flatten(1)
    covariance = conv2d_weight(x, conv.weight.shape, (y - mean.view(-1, 1, 1)) * each, conv.stride, conv.padding)
    covariance = covariance.flatten(1)
    if past is not None:
        patch = patch + shares[0] * past.patch
        spread = (past_mean - mean).unsqueeze(1) * (past.patch - patch)
        covariance = covariance + shares[0] * (past.covariance + spread)
    lean = (shares[1:].unsqueeze(1) * (means - mean)).sum(0)
    covariance = covariance - lean.unsqueeze(1) * patch
    var_at, apart = (covariance * rows).sum(1), mean - (patch * rows).sum(1)
    return Past(patch, covariance, var, var_at, apart, float(counts.sum()))


def make_causal_(model: nn.Module, batch: int, way: Way) -> list[CausalCBN]:
    """Put :class:`CausalCBN` in place of every convolution of a network of the lab and the norm after it."""
    made = []
    for block in list(model.modules()):
        pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")]
        for conv, norm in pairs:
            if conv in block._modules and isinstance(block._modules.get(norm), nn.BatchNorm2d):
                made.append(CausalCBN(block._modules[conv], block._modules[norm], batch, way))
                block._modules[conv], block._modules[norm] = made[-1], nn.Identity()
    return made
