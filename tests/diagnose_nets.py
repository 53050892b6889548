"""What the tests of the measurements share: small models, their batches, and how results are compared."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import anybatch as ab
from anybatch.diagnose import (
    Subject,
    batch_noise,
    cancellation,
    depth,
    diverging_step,
    evaluation_gap,
    gaussian_products,
    gradient_noise,
    history_error,
    learning_rate,
    logit_gradients,
    step_size,
    weight_gradients,
)

D = torch.float64
# Every measurement, and arguments that make it short.
EVERY: dict[str, tuple[Any, dict[str, Any]]] = {
    "depth": (depth, {}),
    "step_size": (step_size, {"steps": (0.01, 0.5)}),
    "diverging_step": (diverging_step, {"step": 1.0, "fractions": 3}),
    "weight_gradients": (weight_gradients, {}),
    "logit_gradients": (logit_gradients, {}),
    "cancellation": (cancellation, {}),
    "gradient_noise": (gradient_noise, {"examples": 4}),
    "learning_rate": (learning_rate, {"rates": (0.01, 0.1), "steps": 4}),
    "gaussian_products": (gaussian_products, {"width": 5, "factors": (1, 2), "draws": 2}),
    "batch_noise": (batch_noise, {"sizes": (1, 2)}),
    "evaluation_gap": (evaluation_gap, {}),
    "history_error": (history_error, {"ages": 2}),
}
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def measured(name: str, subject: Subject) -> Any:
    module, short = EVERY[name]
    return module.measure(subject, **short)


class Small(nn.Module):
    """A norm, a convolution that runs twice, pooling, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.twice, self.fc = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(image)))
        y = self.twice(F.relu(self.twice(y)))
        return self.fc(y.mean((2, 3)))


class Noise(nn.Module):
    """Draws from every generator there is, in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2) * (1 + random.random() + float(np.random.rand())) if self.training else x


def chain(*extra: nn.Module, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Two convolutions with their norms at 1 and 4, and a classifier."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *extra, nn.Linear(6, 5)]
    body = [nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU()]
    return nn.Sequential(*body, *head)


def deep() -> nn.Sequential:
    """Five linear maps and nothing between: a step soon goes too far."""
    return nn.Sequential(nn.Flatten(), nn.Linear(105, 6), *(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 5))


def batches(count: int = 2, examples: int = 3, dtype: torch.dtype = D) -> list[Batch]:
    """Images of 5 x 7, brighter and darker ones, with their classes."""
    bright = [torch.randn(examples, 3, 1, 1, dtype=dtype) for _ in range(count)]
    return [(torch.randn(examples, 3, 5, 7, dtype=dtype) + b, torch.randint(5, (examples,))) for b in bright]


def small(count: int = 1, examples: int = 3) -> tuple[Small, Subject]:
    model = Small().double()
    return model, Subject(model, batches(count, examples), F.cross_entropy, count)


def twin(model: nn.Module) -> nn.Module:
    """Another one to do anything with, history and all, in training mode."""
    other = copy.deepcopy(model)
    ab.load_history_state_dict(other, ab.history_state_dict(model))
    return other.train()


def calls(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """A list that gets (name, module, input, output) of every call of these modules from now on."""
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.append((name, module, args[0].detach().clone(), y))
        )
    return seen


def squares(z: Tensor, _: object) -> Tensor:
    """A loss that nothing saturates."""
    return (z - 1).square().mean()


def stepped(model: nn.Module, batch: Batch, size: float, loss: Loss = F.cross_entropy) -> nn.Module:
    """The model after one step along the gradient."""
    other = twin(model)
    other.zero_grad()
    loss(other(batch[0]), batch[1]).backward()
    with torch.no_grad():
        for p in other.parameters():
            p -= size * p.grad
    return other


def same(a: Any, b: Any, **tolerance: float) -> None:
    """Every field of two results, to the last bit by default."""
    mine, theirs = (tree_leaves(list(vars(result).values())) for result in (a, b))
    for x, y in zip(mine, theirs, strict=True):
        if isinstance(x, str) or x is None:
            assert x == y
        else:
            x, y = torch.as_tensor(x, dtype=D), torch.as_tensor(y, dtype=D)
            torch.testing.assert_close(x, y, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))
