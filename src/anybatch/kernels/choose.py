"""Which implementation a tensor gets, decided in one place.

    reference   core's functions: on CPU torch's own fused BatchNorm kernels, in a compiled graph plain operators that
                the compiler fuses with what stands around them, anywhere float64
    triton      on CUDA, asked for: each pass one kernel
    aten        on CUDA, asked for: the operators of torch's SyncBatchNorm

What is asked for, by :func:`use`, has passed its tests in Triton's interpreter and against stand-ins, and has not run
on a GPU yet: until it has, nobody gets it without asking.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from ..core.passes import REFERENCE, Passes
from ..errors import AnybatchError
from .cuda_norm import ATEN

__all__ = ["IMPLEMENTATIONS", "choose", "passes_for", "responses_by_triton", "use"]

IMPLEMENTATIONS = ("reference", "aten", "triton")
_FUSED = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then its kernels run on CPU

# A global and not a context variable: a backward runs in another thread than its forward.
_asked_for = "reference"
_passes = {"reference": REFERENCE, "aten": ATEN}


def choose(y: Tensor) -> str:
    """The implementation that normalises ``y`` (N, C, *): "reference", "aten" or "triton".

    Raises:
        AnybatchError: :func:`use` has asked for one that does not run on the device of ``y``.
    """
    if _asked_for == "reference":
        return "reference"
    if not y.is_cuda and not (_asked_for == "triton" and _INTERPRETED):
        raise AnybatchError(
            f"kernels.use({_asked_for!r}): got a tensor on {y.device}; give 'reference', or one on CUDA."
        )
    if y.dtype not in _FUSED or not 0 < y.numel() < 2**30 or not _plain(y):  # the kernels count in 32 bits
        return "reference"
    return _asked_for


def _plain(tensor: Tensor) -> bool:
    """No DTensor, and nothing else without memory of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _readable(rows: Tensor) -> bool:
    return _plain(rows) and rows.dtype in _FUSED and rows.stride(1) == 1


def passes_for(y: Tensor) -> Passes:
    """The passes of :func:`choose`."""
    name = choose(y)
    if name == "triton":
        _load_triton()
    return _passes[name]


def responses_by_triton(weight: Tensor, covariance: Tensor, patch: Tensor) -> bool:
    """Whether these responses are Triton's to compute: it reads rows that are contiguous, from one device."""
    layer = (weight, covariance, patch)
    if _asked_for != "triton" or not all(_readable(t) and t.device == weight.device for t in layer):
        return False
    return weight.is_cuda or _INTERPRETED


@contextmanager
def use(name: str) -> Iterator[None]:
    """Let every layer use one implementation within; outside of this it is "reference".

    What no kernel is made for, such as float64 and empty batches, still goes to the reference.

    Raises:
        AnybatchError: there is no such implementation, or it does not run here.
    """
    global _asked_for
    if name not in IMPLEMENTATIONS:
        raise AnybatchError(f"kernels.use got {name!r}: give one of {', '.join(IMPLEMENTATIONS)}.")
    if name == "aten" and not torch.cuda.is_available():
        raise AnybatchError("kernels.use('aten'): these operators of torch exist on CUDA alone; give 'reference'.")
    if name == "triton":
        if not _TRITON:
            raise AnybatchError("kernels.use('triton'): no triton here; pip install triton, or give 'aten'.")
        _load_triton()
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def _load_triton() -> None:
    if "triton" not in _passes:
        from .triton_norm import TRITON

        _passes["triton"] = TRITON
