"""Why depth makes a network without normalization ill-conditioned: singular values of products of random matrices.

    P_M = A_1 A_2 ... A_M,   entries of A_m independent Normal(0, 1/N), N x N
    condition(M) = largest singular value of P_M over the smallest

A linear network of M layers at initialization maps by P_M; its condition number grows exponentially with M (Bjorck et
al., arXiv 1806.02375, their section on random initialization). In float64 products beyond a condition of 1e15 say no
more than that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .panels import Panel
from .subject import Passes, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GaussianProducts", "measure", "passes", "plot", "products", "said"]


@dataclass(frozen=True)
class GaussianProducts:
    """Singular values of products.

    Attributes:
        factors: (M,) numbers of matrices multiplied.
        singular: (M, N) singular values, descending, geometric means over the draws.
        condition: (M,) geometric mean over the draws of the condition number.
    """

    factors: tuple[int, ...]
    singular: Tensor
    condition: Tensor


def products(width: int, factors: Sequence[int], seed: int) -> list[Tensor]:
    """For each number of factors the product of so many matrices, of one sequence; float64."""
    generator = torch.Generator().manual_seed(seed)
    product, found = torch.eye(width, dtype=torch.float64), {}
    for m in range(1, max(factors) + 1):
        product = product @ torch.randn(width, width, dtype=torch.float64, generator=generator) / math.sqrt(width)
        found[m] = product
    return [found[m] for m in factors]


def measure(
    subject: Subject | None = None, width: int = 100, factors: Sequence[int] = (1, 2, 3, 5, 7, 10), draws: int = 10
) -> GaussianProducts:
    """Singular values and condition number of products of independent Gaussian matrices, over several draws.

    Args:
        subject: not needed; the matrices stand for layers.
        width: N.
        factors: numbers of matrices, at least 1 each.
        draws: independent products.
    """
    values = [[torch.linalg.svdvals(p) for p in products(width, factors, seed)] for seed in range(draws)]
    logs = torch.stack([torch.stack(draw) for draw in values]).log()  # (draws, M, N)
    return GaussianProducts(tuple(factors), logs.mean(0).exp(), (logs[..., 0] - logs[..., -1]).mean(0).exp())


def passes(subject: Subject) -> Passes:
    """None: no model runs."""
    return Passes()


def panels(found: Mapping[str, GaussianProducts]) -> list[Panel]:
    """Singular values, one line a number of factors, and condition against that number."""
    at = next(iter(found.values()))
    ranks = list(range(1, at.singular.shape[1] + 1))
    spectra = {f"M = {m}": (ranks, s.tolist()) for m, s in zip(at.factors, at.singular, strict=True)}
    condition = {"condition number": ([float(m) for m in at.factors], at.condition.tolist())}
    return [
        Panel("singular values of the product", spectra, "place", log="y"),
        Panel("condition number", condition, "matrices multiplied", log="y"),
    ]


def plot(found: Mapping[str, GaussianProducts]) -> "Figure":
    """The panels as one figure; needs matplotlib."""
    from .figures import draw

    return draw(panels(found))


def said(found: Mapping[str, GaussianProducts]) -> str:
    """The condition at both ends in words."""
    at = next(iter(found.values()))
    return (
        f"the condition number grows from {float(at.condition[0]):.2g} for {at.factors[0]} matrix to "
        f"{float(at.condition[-1]):.2g} for a product of {at.factors[-1]}"
    )
