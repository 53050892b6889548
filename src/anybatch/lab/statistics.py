"""Means over seeds with Student's t intervals, and nothing more."""

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Estimate", "estimate", "t_quantile"]

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % interval; None where one value gives no interval."""

    mean: float
    half_width: float | None
    n: int

    @property
    def spans_zero(self) -> bool:
        """Whether zero lies in the interval, or cannot be ruled out since there is none."""
        return self.half_width is None or abs(self.mean) <= self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` (at least one) and its t interval.

    Shape: the half width is t(n - 1) * s / sqrt(n), with s the sample standard deviation (n - 1 below the line).
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, t_quantile(n - 1) * math.sqrt(variance / n), n)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = `confidence` at `freedom` (>= 1) degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _central_probability(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < confidence else (low, middle)
    return high


def _central_probability(t: float, freedom: int) -> float:
    """P(|T| <= t). Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, finite sums for whole degrees of freedom."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine_squared = math.cos(theta) ** 2
    odd = freedom % 2
    term, total = (math.cos(theta), 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine_squared * (k - 1) / k
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
