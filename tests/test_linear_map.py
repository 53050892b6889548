"""E[p] and the covariance equal float64 autograd, for every kind of linear map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anybatch.core.linear_map import LinearMap
from anybatch.core.moments import moments

from .oracle import batch_moments, patches, run
from .tolerances import ORACLE

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def assert_closed_forms(module: nn.Module, x: torch.Tensor) -> None:
    """The closed forms against the jacobian of mean and variance by the weight."""
    geometry = LinearMap.of(module)
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    y = run(module, weight, bias, x)
    now = moments(y)
    mean_by, var_by = torch.autograd.functional.jacobian(lambda w: batch_moments(run(module, w, bias, x)), weight)

    patch = geometry.mean_patch(x, tuple(y.shape[2:]))
    centred = y - now.mean.view(1, -1, *[1] * (y.dim() - 2))
    covariance = geometry.covariance(x, centred, weight)

    channels = y.shape[1]
    for c in range(channels):  # d mean_c / dW is E[p] in row c and zero elsewhere
        rows = geometry.rows(mean_by[c])
        expected = torch.zeros_like(rows)
        expected[c] = patch[c * geometry.groups // channels]
        torch.testing.assert_close(rows, expected, **ORACLE)
        rows = geometry.rows(var_by[c])
        expected = torch.zeros_like(rows)
        expected[c] = 2 * covariance[c]
        torch.testing.assert_close(rows, expected, **ORACLE)

    # The patches of all positions: every output's derivative by its channel's row of the weight.
    size = tuple(y.shape[2:])
    at = torch.unravel_index(torch.arange(y.numel() // channels), (len(y), *size))
    found = geometry.patches(x, *geometry.reading(tuple(x.shape[2:]) if geometry.kernel else (), size, at))
    for position, by_weight in zip(found, patches(module, weight, bias, x), strict=True):
        for c in range(channels):
            row = position[c * geometry.groups // channels]
            torch.testing.assert_close(geometry.rows(by_weight[c])[c], row, **ORACLE)


@st.composite
def convolutions(draw, table, modes):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    transposed = table is TRANSPOSED
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    mode = draw(st.sampled_from(modes))
    options = {}
    if transposed:
        padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif draw(st.booleans()) and all(s == 1 for s in stride):
        padding = "same"
    else:
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    # A transposed map puts out up to three times the size a side, and the jacobian takes every output by itself.
    least, most = (2, 4) if transposed else (5, 7)
    size = tuple(draw(st.integers(least, most - (dims == 3))) for _ in range(dims))
    module = table[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
        **options,
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    return module, torch.randn(draw(st.integers(1, 3)), module.in_channels, *size, dtype=torch.float64) + 0.5


@given(convolutions(CONVS, ["zeros", "circular", "reflect", "replicate"]))
def test_convolutions(case) -> None:
    assert_closed_forms(*case)


@given(convolutions(TRANSPOSED, ["zeros"]))
def test_transposed_convolutions(case) -> None:
    assert_closed_forms(*case)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_linear(n: int, channels: int, k: int, bias: bool) -> None:
    module = nn.Linear(k, channels, bias=bias, dtype=torch.float64)
    assert_closed_forms(module, torch.randn(n, k, dtype=torch.float64))


@pytest.mark.parametrize("channels", [3, 6], ids=["depthwise", "depth multiplier 2"])
def test_depthwise(channels: int) -> None:
    module = nn.Conv2d(3, channels, (3, 2), stride=(2, 1), padding=1, groups=3, dtype=torch.float64)
    assert_closed_forms(module, torch.randn(2, 3, 7, 5, dtype=torch.float64))


def test_channels_last_is_the_same() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    y = module(x).detach()
    geometry = LinearMap.of(module)
    last = {"memory_format": torch.channels_last}
    for a, b in [
        (geometry.mean_patch(x, (5, 7)), geometry.mean_patch(x.to(**last), (5, 7))),
        (geometry.covariance(x, y, module.weight), geometry.covariance(x.to(**last), y.to(**last), module.weight)),
    ]:
        torch.testing.assert_close(a, b, **ORACLE)


def test_other_modules_are_no_linear_maps() -> None:
    assert LinearMap.of(nn.ReLU()) is None
    assert LinearMap.of(nn.Bilinear(2, 2, 2)) is None


@pytest.mark.parametrize("padding", [(1, 0), "same", "valid", 1])
def test_padding_and_dilation_changed_after_building(padding) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=padding if isinstance(padding, str) else 2, dtype=torch.float64)
    conv.dilation = (2, 1)  # as segmentation models dilate a trained encoder
    conv.padding = padding
    x = torch.randn(2, 2, 9, 7, dtype=torch.float64)
    y = conv(x)
    patch = LinearMap.of(conv).mean_patch(x, tuple(y.shape[2:]))
    torch.testing.assert_close(conv.weight.flatten(1) @ patch[0] + conv.bias, y.mean((0, 2, 3)), **ORACLE)
