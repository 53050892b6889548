import math

import pytest

from anybatch.lab.statistics import estimate, t_quantile

# Two-sided 95 % quantiles as printed in any table of Student's t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_t_quantile_is_that_of_the_table(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_t_quantile_at_other_confidence() -> None:
    assert t_quantile(1, 0.5) == pytest.approx(1.0)
    assert t_quantile(2, 0.99) == pytest.approx(9.925, abs=5e-4)


def test_estimate_by_hand() -> None:
    mean, half_width, n = estimate([79.0, 80.0, 82.0])
    assert (n, mean) == (3, pytest.approx(80.3333333))
    assert half_width == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    one = estimate([5.0])
    assert one.half_width is None
    assert one.spans_zero


def test_spans_zero() -> None:
    assert estimate([-1.0, 1.5, 0.2]).spans_zero
    assert not estimate([-9.0, -9.5, -9.2]).spans_zero
