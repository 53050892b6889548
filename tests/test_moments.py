"""The one place where means and variances are computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.core.moments import bessel, moments, pool, update_running_

from .oracle import batch_moments
from .tolerances import LARGE_MEAN, ORACLE, REORDERED, SAME


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (3, 1), (2, 5, 1), (7, 2, 3, 1, 2)], ids=str)
def test_by_definition(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    now = moments(x)
    for mine, wanted in zip(now[:2], batch_moments(x), strict=True):
        torch.testing.assert_close(mine, wanted, **ORACLE)
    assert now.size == x.numel() // shape[1]


def test_large_mean_keeps_its_variance() -> None:
    x = torch.randn(4, 3, 9, 9) + 1e4
    now = moments(x)
    torch.testing.assert_close(now.var, batch_moments(x.double())[1].float(), **LARGE_MEAN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 64, 64) * 100 + 300).to(dtype)  # squares overflow float16
    now = moments(x)
    assert now.mean.dtype == now.var.dtype == torch.float32
    mean, var = batch_moments(x.double())
    torch.testing.assert_close(now.mean, mean.float(), **REORDERED)
    torch.testing.assert_close(now.var, var.float(), **REORDERED)


def test_memory_format_makes_no_difference() -> None:
    x = torch.randn(3, 5, 4, 6)
    for a, b in zip(moments(x)[:2], moments(x.to(memory_format=torch.channels_last))[:2], strict=True):
        torch.testing.assert_close(a, b, **SAME)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-1e3, 1e3))
def test_pooled_by_count_is_the_concatenation(sizes: list[int], centre: float) -> None:
    parts = [torch.randn(n, 3, 2, dtype=torch.float64) * (i + 1) + centre * i for i, n in enumerate(sizes)]
    each = [moments(p) for p in parts]
    counts = torch.tensor([float(m.size) for m in each], dtype=torch.float64)
    means, variances = (torch.stack([m[i] for m in each], 1) for i in (0, 1))
    for mine, wanted in zip(
        pool(means, variances, counts / counts.sum()), batch_moments(torch.cat(parts)), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


def test_running_total_variance_is_that_of_the_moments() -> None:
    """E[x] and E[x^2] averaged exponentially, in float64 where the difference does no harm."""
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    first, second = mean.clone(), var + mean.square()
    for i in range(20):
        now = moments(torch.randn(2, 3, 4, dtype=torch.float64) + i % 3)
        update_running_(mean, var, now.mean, now.var, 0.2)
        first, second = 0.8 * first + 0.2 * now.mean, 0.8 * second + 0.2 * (now.var + now.mean.square())
    torch.testing.assert_close(mean, first, **ORACLE)
    torch.testing.assert_close(var, second - first.square(), **ORACLE)


def test_running_variance_as_torch_keeps_it() -> None:
    bn = torch.nn.BatchNorm1d(3)
    mean, var = torch.zeros(3), torch.ones(3)
    for i in range(5):
        x = torch.randn(4, 3) + i
        bn(x)
        now = moments(x)
        update_running_(mean, var, now.mean, bessel(now.var, now.size), 0.1, total=False)
    torch.testing.assert_close(mean, bn.running_mean, **SAME)
    torch.testing.assert_close(var, bn.running_var, **SAME)
