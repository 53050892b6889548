"""The equations written out in float64, differentiated by autograd: what the layers are held to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel, by definition."""
    channels = y.transpose(0, 1).flatten(1)
    mean = channels.mean(1)
    return mean, (channels - mean[:, None]).square().mean(1)


def weighted_moments(batches: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """Moments of the batches' concatenation in which every value of a batch counts ``weight``."""
    rows = [y.transpose(0, 1).flatten(1) for y in batches]
    w = torch.cat(
        [torch.full(row.shape[1:], weight, dtype=row.dtype) for row, weight in zip(rows, weights, strict=True)]
    )
    values, w = torch.cat(rows, 1), w / w.sum()
    mean = values @ w
    return mean, (values - mean[:, None]).square() @ w


def run(map: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return functional_call(map, parameters, (x,))


@dataclass
class Past:
    """One past batch: its moments and their derivatives by the map's parameters, from autograd."""

    map: nn.Module
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    count: int = field(init=False)

    def __post_init__(self) -> None:
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)

        def of_parameters(*p: Tensor) -> tuple[Tensor, Tensor]:
            return batch_moments(run(self.map, p[0], p[1] if len(p) > 1 else None, self.x))

        self.mean, self.var = of_parameters(*parameters)
        self.mean_by, self.var_by = torch.autograd.functional.jacobian(of_parameters, parameters)
        y = run(self.map, self.weight, self.bias, self.x)
        self.count = y.numel() // y.shape[1]

    def at(self, weight: Tensor, bias: Tensor | None, second_moment: bool) -> tuple[Tensor, Tensor]:
        """Moments carried to other parameters, to first order in E[y] and the standard deviation (or E[y^2])."""
        steps = [weight - self.weight] + ([] if bias is None else [bias - self.bias])

        def along(jacobians: tuple[Tensor, ...]) -> Tensor:
            return sum((j.flatten(1) @ s.flatten() for j, s in zip(jacobians, steps, strict=True)), torch.zeros(()))

        mean = self.mean + along(self.mean_by)
        if second_moment:
            nu_by = tuple(
                v + 2 * self.mean.view(-1, *[1] * (m.dim() - 1)) * m
                for v, m in zip(self.var_by, self.mean_by, strict=True)
            )
            nu = self.var + self.mean.square() + along(nu_by)
            return mean, torch.maximum(nu, mean.square()) - mean.square()
        deviation = self.var.sqrt()
        return mean, (deviation + along(self.var_by) / (2 * deviation)).square()


def pooled_moments(
    y: Tensor, past: list[Past], weight: Tensor, bias: Tensor | None, *, equal: bool, second_moment: bool, detach: bool
) -> tuple[Tensor, Tensor]:
    """Moments of the window: nu_bar - mu_bar^2 over the carried moments, shares by count or equal."""
    mean, var = batch_moments(y)
    means, nus, counts = [mean], [var + mean.square()], [y.numel() / y.shape[1]]
    for entry in past:
        mean, var = entry.at(weight, bias, second_moment)
        if detach:
            mean, var = mean.detach(), var.detach()
        means.append(mean)
        nus.append(var + mean.square())
        counts.append(entry.count)
    shares = torch.tensor([1.0] * len(counts) if equal else counts, dtype=torch.float64)
    shares = shares / shares.sum()
    mu = (torch.stack(means) * shares[:, None]).sum(0)
    return mu, (torch.stack(nus) * shares[:, None]).sum(0) - mu.square()


def normalise(y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    shape = (1, -1, *[1] * (y.dim() - 2))
    y_hat = (y - mean.view(shape)) / torch.sqrt(var + eps).view(shape)
    return gamma.view(shape) * y_hat + beta.view(shape)


def patches(map: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Every output's derivative by the weight, (M, C, *weight.shape) for M positions."""
    by_weight = torch.autograd.functional.jacobian(lambda w: run(map, w, bias, x), weight.detach())
    return by_weight.movedim(1, -1 - weight.dim()).flatten(0, -2 - weight.dim())


@dataclass
class Exponential:
    """All past batches pooled with shares that fall by ``decay``; what they answer is read from some positions."""

    decay: float
    second_moment: bool
    equal: bool = False
    detach: bool = False
    size: float = 0.0
    size_at: float = 0.0  # what is left of ``size`` as it was when positions were last looked at

    def pool(
        self, y: Tensor, p: Tensor, at: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Moments to normalise y by, differentiable; the batch is taken in.

        Args:
            y: (N, C, *) of the map.
            p: all its patches.
            at: the positions (S,) that are looked at, None: none of this batch.
            weight: of the map, today.
            bias: of the map, today.
        """
        now_mean, now_var = batch_moments(y)
        n = 1.0 if self.equal else y.numel() / y.shape[1]
        s = n / (self.decay * self.size + n)
        s_at = min(1 - self.decay * self.size_at / (self.decay * self.size + n), 1 - (1 - s) / 8)
        looked = at is not None
        seen = y.movedim(1, -1).flatten(0, -2)[at if looked else slice(None)].detach()
        p = p[at if looked else slice(None)]
        seen_mean = seen.mean(0)
        covariance = ((seen - seen_mean).view(*seen.shape, *[1] * weight.dim()) * (p - p.mean(0))).mean(0)
        seen_var = (seen - seen_mean).square().mean(0)
        state = (now_mean, now_var, seen_mean, seen_var, p.mean(0), covariance)
        mean, var = now_mean, now_var
        if self.size:
            dims = tuple(range(1, 1 + weight.dim()))
            old_mean, old_var, mean_at, var_at, patch, cov = self.state
            of_mean = (patch * weight).sum(dims) + (0 if bias is None else bias)
            of_var = (cov * weight).sum(dims)
            if self.second_moment:
                then_mean = old_mean + of_mean - mean_at
                nu = old_var + old_mean.square() + 2 * (of_var - var_at) + 2 * old_mean * (of_mean - mean_at)
                then_var = torch.maximum(nu - then_mean.square(), torch.zeros_like(nu))
            else:
                ratio = of_var / var_at
                then_mean, then_var = of_mean + ratio * (old_mean - mean_at), ratio.square() * old_var
            if self.detach:
                then_mean, then_var = then_mean.detach(), then_var.detach()
            mean = (1 - s) * then_mean + s * now_mean
            var = (1 - s) * (then_var + then_mean.square()) + s * (now_var + now_mean.square()) - mean.square()
            of_mean, of_var = of_mean.detach(), of_var.detach()
            both = (1 - s_at) * of_mean + s_at * seen_mean
            raised = (1 - s_at) * (of_var + of_mean.square()) + s_at * (seen_var + seen_mean.square()) - both.square()
            apart = (seen_mean - of_mean).view(-1, *[1] * weight.dim())
            new_cov = (1 - s_at) * cov + s_at * covariance + s_at * (1 - s_at) * apart * (p.mean(0) - patch)
            state = (mean, var, both, raised, (1 - s_at) * patch + s_at * p.mean(0), new_cov)
            if not looked:
                state = (mean, var, of_mean, of_var, patch, cov)
        self.state = tuple(t.detach() for t in state)
        self.size = self.decay * self.size + n
        self.size_at = self.size if looked else self.decay * self.size_at
        return mean, var
