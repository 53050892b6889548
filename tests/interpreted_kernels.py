"""The Triton kernels in Triton's interpreter, on CPU: run by test_kernels.py with TRITON_INTERPRET=1, in a process of
their own, since Triton decides at its import whether it interprets."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anybatch import kernels
from anybatch.core.passes import Affine, Passes
from anybatch.kernels import triton_norm, triton_responses
from anybatch.kernels.choose import passes_for
from anybatch.kernels.responses import responses_of_all
from anybatch.kernels.triton_norm import TRITON

from . import kernel_checks as checks
from .tolerances import REORDERED


@hypothesis.settings(max_examples=15)
@given(shape=checks.shapes, options=checks.options, seed=st.integers(0, 9))
def test_parity(shape: tuple[int, ...], options: dict[str, Any], seed: int) -> None:
    checks.check_parity(TRITON, shape, seed=seed, **options)


@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels second", "channels last"])
def test_odd_shapes(shape: tuple[int, ...], last: bool) -> None:
    checks.check_parity(TRITON, shape, last=last, relu=True)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["channels second", "channels last"])
def test_several_tiles_a_part(programs: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_PROGRAMS", programs)
    for shape in checks.SHAPES[-3:]:
        checks.check_parity(TRITON, shape, last=last, relu=True)
    checks.check_large_mean(TRITON)


@pytest.mark.parametrize("relu", [False, True])
def test_as_batch_norm(relu: bool) -> None:
    checks.check_batch_norm(TRITON, relu)


@pytest.mark.parametrize("check", [checks.check_large_mean, checks.check_not_finite, checks.check_strides])
def test_hard_input(check: Any) -> None:
    check(TRITON)


def layers(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """W, D, P of layers of all sorts: (C, K, G)."""
    sizes = [(4, 9, 1), (6, 1, 6), (1, 5, 1), (8, 2050, 2), (3, 1024, 3)]
    return [(torch.randn(c, k), torch.randn(c, k).to(dtype), torch.randn(g, k).to(dtype)) for c, k, g in sizes]


def by_hand(w: Tensor, d: Tensor, p: Tensor) -> Tensor:
    p = p.double().repeat_interleave(len(w) // len(p), 0)
    return torch.stack([(p * w.double()).sum(1), (d.double() * w.double()).sum(1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_responses(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    kernel = triton_responses.row_responses
    monkeypatch.setattr(triton_responses, "row_responses", Counting(kernel, launches))
    of = layers(dtype)
    with kernels.use("triton"):
        for again in range(2):  # the weights move in place, and the table stays
            results = responses_of_all(*zip(*of, strict=True))
            assert len(launches) == again + 1
            for result, layer in zip(results, of, strict=True):
                scale = layer[0].shape[1] ** 0.5  # of a product of K random terms
                torch.testing.assert_close(result.double() / scale, by_hand(*layer) / scale, **REORDERED)
            for w, _, _ in of:
                w.mul_(-2)
    assert triton_responses._tables.cache_info().hits


def test_responses_of_mixed_layers() -> None:
    """Slices of a ring, several dtypes, and what is not Triton's to read: all in the order that was given."""
    float_layers, half_layers = layers(), layers(torch.bfloat16)
    w, d, p = float_layers[3]
    ring = torch.stack([torch.zeros_like(d), d], 1)
    by_columns = tuple(t.t().contiguous().t() for t in float_layers[4])
    double = tuple(t.double() for t in float_layers[1])
    of = [float_layers[0], half_layers[3], (w, ring[:, 1], p), by_columns, double]
    with kernels.use("triton"):
        results = responses_of_all(*zip(*of, strict=True))
    assert [r.dtype for r in results] == [torch.float32] * 4 + [torch.float64]
    for result, layer in zip(results, of, strict=True):
        scale = layer[0].shape[1] ** 0.5
        torch.testing.assert_close(result.double() / scale, by_hand(*layer) / scale, **REORDERED)


class Counting:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, launches: list[int]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(grid)
        return self.kernel[grid]


def test_operators_keep_torchs_rules() -> None:
    """Schemas, fakes of the right shape and stride, no aliases: what a compiler takes for granted."""
    y, v = checks.channels_last(torch.randn(2, 3, 4, 5)), torch.rand(3) + 0.5
    g = torch.randn(2, 3, 4, 5)
    ops = torch.ops.anybatch
    calls = [
        (ops.triton_moments, (y,)),
        (ops.triton_moments, (torch.randn(2, 1, 90, 90),)),
        (ops.triton_normalise, (y[:, :, ::2], v, v, None, v, 1e-5, True)),
        (ops.triton_reduce, (g, y, v, v, v, v, 1e-5, True)),
        (ops.triton_reduce, (torch.randn(2, 1, 90, 90), torch.randn(2, 1, 90, 90), *[v[:1]] * 4, 1e-5, False)),
        (ops.triton_input_gradient, (g, y, v, v, v, v, 1e-5, v, v, v, False)),
        (ops.triton_input_gradient, (g, y, None, None, None, None, 0.0, v, v, v, False)),
        (ops.triton_responses, tuple(map(list, zip(*layers()[:2], strict=True)))),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


class Normalised(torch.autograd.Function):
    """BatchNorm by the passes that are chosen for y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        passes: Passes = passes_for(y)
        mean, var, _ = passes.moments(y)
        ctx.save_for_backward(y, mean, var, weight, bias)
        return passes.normalise(y, Affine(mean, var, weight, bias, 1e-5), True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, weight, bias = ctx.saved_tensors
        passes, affine, m = passes_for(y), Affine(mean, var, weight, bias, 1e-5), y.numel() // y.shape[1]
        handed, sums = passes.reduce(g, y, affine, True)
        inverse = torch.rsqrt(var + 1e-5)
        slope, offset = -weight * inverse.square() * sums.g_y_hat / m, -weight * inverse * sums.g / m
        return passes.input_gradient(handed, y, affine, mean, slope, offset, True), sums.g_y_hat, sums.g


def normalised(*leaves: Tensor) -> Tensor:
    out: Tensor = Normalised.apply(*leaves)
    return out


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names: set[str] = set()

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    leaves = [torch.randn(2, 3, 5, 4).requires_grad_(), *(torch.randn(3).requires_grad_() for _ in range(2))]
    g = torch.randn(2, 3, 5, 4)
    with kernels.use("triton"):
        compiled = torch.compile(normalised, backend=aot_autograd(fw_compiler=look), fullgraph=True)
        outs = [f(*leaves) for f in (compiled, normalised)]
        grads = [torch.autograd.grad(out, leaves, g) for out in outs]
    for mine, right in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(mine, right, **REORDERED)
    ops = {"triton_moments", "triton_normalise", "triton_reduce", "triton_input_gradient"}
    assert {f"anybatch.{op}.default" for op in ops} <= names
