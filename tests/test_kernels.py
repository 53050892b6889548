"""Fused kernels: parity with core's reference, and which is chosen when."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import anybatch as ab
from anybatch import kernels
from anybatch.core.passes import REFERENCE
from anybatch.core.taylor import Entries, responses
from anybatch.kernels import choose as choosing
from anybatch.kernels import cuda_norm
from anybatch.kernels.choose import choose
from anybatch.kernels.responses import responses_of_all

from . import kernel_checks as checks
from .tolerances import ORACLE, REORDERED

CHECKS = [checks.check_large_mean, checks.check_not_finite, checks.check_strides]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels' numbers on a GPU")


def test_triton_kernels_interpreted() -> None:
    """All of interpreted_kernels.py; without triton, which the dev extra brings, it fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/interpreted_kernels.py",
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_triton_kernels_compile_for_a_gpu(
    dtype: torch.dtype, relu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which takes no GPU; the interpreter lets pass what the compiler would not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anybatch.kernels import triton_device as device

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    y, row = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype], "*fp32"
    value = {"*fp32": triton.language.float32, "*bf16": triton.language.bfloat16, "*fp16": triton.language.float16}
    sizes = dict.fromkeys(("rows", "channels", "positions", "by_n", "by_c", "by_s", "part_rows", "parts"), "i32")
    types = sizes | {"y": y, "g": y, "out": y, "grad": y, "eps": "fp32", "layers": "*i64", "layer_of_row": "*i32"}
    constants = {"RELU": relu, "SCALED": True, "R": 32, "C": 64, "P": 16, "K": 256, "FIELDS": 9}
    constants |= {"WEIGHT": value["*fp32"], "COVARIANCE": value[y], "PATCH": value[y]}
    if not relu:
        constants |= {"weight": None, "bias": None}
    for name in device.__all__:
        kernel = getattr(device, name)
        signature = {n: "constexpr" if n in constants else types.get(n, row) for n in kernel.arg_names}
        given_constants = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
        source = ASTSource(kernel, signature, given_constants)
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


@pytest.fixture(scope="module")
def aten_on_cpu() -> Iterator[None]:
    """Stand-ins for the operators that torch has on CUDA alone, strict about what those take for granted."""

    def row(v: Tensor, y: Tensor) -> Tensor:
        return v.double().view(-1, *[1] * (y.dim() - 2))

    def agree(y: Tensor, mean: Tensor, inverse: Tensor, *parameters: Tensor | None) -> None:
        assert {t.dtype for t in (mean, inverse, *parameters) if t is not None} == {torch.float32}, y.dtype

    def elemt(y: Tensor, weight: Any, bias: Any, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
        agree(y, mean, inverse, weight, bias)
        out = (y.double() - row(mean, y)) * row(inverse, y)
        out = out if weight is None else out * row(weight, y)
        return torch.empty_like(y).copy_(out if bias is None else out + row(bias, y))

    def reduce(g: Tensor, y: Tensor, mean: Tensor, inverse: Tensor, weight: Any, *wanted: bool) -> tuple[Any, ...]:
        agree(y, mean, inverse, weight)
        assert (g.dtype, g.stride()) == (y.dtype, y.stride())
        assert wanted == (True, False, False)
        dims = [d for d in range(y.dim()) if d != 1]
        sums = g.double().sum(dims), (g.double() * (y.double() - row(mean, y))).sum(dims)
        return *(s.float() for s in sums), torch.empty(0), torch.empty(0)

    def backward_elemt(
        g: Tensor, y: Tensor, mean: Tensor, inverse: Tensor, weight: Any, a: Tensor, b: Tensor, count: Tensor
    ) -> Tensor:
        agree(y, mean, inverse, weight, a, b)
        assert (g.dtype, g.stride(), count.dtype) == (y.dtype, y.stride(), torch.int32)
        by_y_hat = (y.double() - row(mean, y)) * row(inverse, y).square() * row(b, y) / count.sum()
        scale = row(inverse, y) * (1 if weight is None else row(weight, y))
        return torch.empty_like(y).copy_((g.double() - row(a, y) / count.sum() - by_y_hat) * scale)

    class Aten:
        """torch.ops.aten, but that the moments of half precision are float32, as on CUDA."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.aten, name)

        def batch_norm_update_stats(self, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            mean, var = torch.ops.aten.batch_norm_update_stats(y.float(), *rest)
            return mean, var

    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_norm, "aten", Aten())
        library.impl("batch_norm_elemt", elemt, "CPU")
        library.impl("batch_norm_backward_reduce", reduce, "CPU")
        library.impl("batch_norm_backward_elemt", backward_elemt, "CPU")
        yield


@pytest.mark.usefixtures("aten_on_cpu")
class TestAten:
    @hypothesis.settings(max_examples=25)
    @given(shape=checks.shapes, options=checks.options, seed=st.integers(0, 9))
    def test_parity(self, shape: tuple[int, ...], options: dict[str, Any], seed: int) -> None:
        checks.check_parity(cuda_norm.ATEN, shape, seed=seed, **options)

    @pytest.mark.parametrize("relu", [False, True])
    def test_as_batch_norm(self, relu: bool) -> None:
        checks.check_batch_norm(cuda_norm.ATEN, relu)

    @pytest.mark.parametrize("check", CHECKS)
    def test_hard_input(self, check: Any) -> None:
        check(cuda_norm.ATEN)


@pytest.mark.parametrize("relu", [False, True])
def test_reference_as_batch_norm(relu: bool) -> None:
    checks.check_batch_norm(REFERENCE, relu)


@on_cuda
@pytest.mark.parametrize("name", ["aten", "triton"])
def test_on_the_gpu(name: str) -> None:
    with kernels.use(name), torch.device("cuda"):
        passes = choosing.passes_for(torch.empty(1, 1))
        for shape in checks.SHAPES:
            for dtype in checks.DTYPES:
                for last in (False, True):
                    checks.check_parity(passes, shape, dtype, last=last, relu=last)
        for check in CHECKS:
            check(passes)
        layer = [torch.randn(4, 90), torch.randn(4, 90), torch.randn(2, 90)]
        right = responses_of_all(*[[t.cpu().double()] for t in layer])[0]
        torch.testing.assert_close(responses_of_all(*[[t] for t in layer])[0].cpu().double(), right, **REORDERED)


def test_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.randn(2, 3, 4)
    assert choose(y) == "reference"
    assert choosing.passes_for(y) is REFERENCE
    with kernels.use("triton"):
        with pytest.raises(ab.AnybatchError, match=r"'triton'.*on cpu"):
            choose(y)
        monkeypatch.setattr(choosing, "_INTERPRETED", True)
        assert choose(y) == "triton"
        assert choose(y.double()) == choose(y[:0]) == "reference"
        with kernels.use("reference"):
            assert choose(y) == "reference"
        assert choose(y) == "triton"
    assert choose(y) == "reference"


def test_triton_is_not_imported_before_it_is_used() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import anybatch; assert ('triton' in sys.modules) == had"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_chosen_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, dtype and size, on tensors that are fake."""
    with FakeTensorMode():
        y = torch.empty(2, 3, 4, 4, device="cuda", dtype=torch.bfloat16)
        assert choose(y) == "reference"  # nobody asked for another
        with kernels.use("triton"):
            assert choose(y) == "reference"  # no memory to read
            monkeypatch.setattr(choosing, "_plain", lambda _: True)
            assert choose(y) == choose(y.float()) == choose(y.half()) == "triton"
            assert choose(y.double()) == choose(torch.empty(0, 3, device="cuda")) == "reference"
            assert choose(torch.empty(1, 1, 2**30, device="cuda")) == "reference"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with kernels.use("aten"):
            assert choose(y) == "aten"


def test_what_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ab.AnybatchError, match=r"'fast'.*reference"), kernels.use("fast"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ab.AnybatchError, match="CUDA alone"), kernels.use("aten"):
        pass
    monkeypatch.setattr(choosing, "_TRITON", False)
    with pytest.raises(ab.AnybatchError, match="pip install triton"), kernels.use("triton"):
        pass
    assert choose(torch.ones(1, 1)) == "reference"


def test_responses_are_cores() -> None:
    """One layer at a time, as core/taylor.py has them of a history with one entry."""
    torch.manual_seed(0)
    layers = []
    for c, k, g in [(4, 9, 1), (6, 5, 3), (2, 7, 2)]:
        layers.append(tuple(torch.randn(n, k, dtype=torch.float64) for n in (c, c, g)))
    for result, (w, d, p) in zip(responses_of_all(*zip(*layers, strict=True)), layers, strict=True):
        entries = Entries(*[torch.ones(0)] * 5, patch=p.unsqueeze(1), covariance=d.unsqueeze(1))
        wanted, _ = responses(entries, p, d, w, None)
        torch.testing.assert_close(result, torch.cat([wanted.mean, wanted.var], 1), **ORACLE)


def test_responses_that_do_not_fit() -> None:
    w, p = torch.ones(4, 3), torch.ones(1, 3)
    with pytest.raises(ab.AnybatchError, match="2 weights, 1 covariances and 1 patches"):
        responses_of_all([w, w], [w], [p])
    for d, patch in ((w[:3], p), (w, p[:, :2]), (w, torch.ones(3, 3)), (w, p[:0])):
        with pytest.raises(ab.AnybatchError, match="layer 1 has"):
            responses_of_all([w, w], [w, d], [p, patch])
    assert responses_of_all([], [], []) == []
