"""Points and shares by which a function of a standard normal variable is averaged.

E[f(P)] = sum_i share_i f(node_i).  quantiles: node_i = sqrt(2) erfinv(2 (i + 1/2) / n - 1), equal shares.
gauss-hermite: exact for polynomials up to the degree 2 n - 1.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["QUADRATURES", "standard_normal"]

QUADRATURES = ("quantiles", "gauss-hermite")


@lru_cache
def standard_normal(kind: str, points: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and shares (n,), computed in float64; one of ``QUADRATURES``."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        if kind == "quantiles":
            at = (2 * torch.arange(points, dtype=torch.float64) + 1) / points - 1
            nodes, shares = math.sqrt(2) * torch.erfinv(at), torch.full_like(at, 1 / points)
        else:  # Golub and Welsch: the recurrence of Hermite's polynomials as a matrix
            beside = torch.arange(1, points, dtype=torch.float64).sqrt()
            nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
            shares = vectors[0].square()
        return nodes.to(device, dtype), shares.to(device, dtype)
