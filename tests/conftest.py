"""What every test runs under: a fixed seed, one thread, poisoned uninitialised memory."""

import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.torchvision_operators import declare

declare()  # before anything imports torchvision

# A shell ignores Ctrl-C in what it starts in the background, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("anybatch", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("anybatch")


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed, one thread, and nan in whatever torch.empty and its kin return to Python code."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta" and not torch.compiler.is_compiling():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """Accelerate keeps its first settings for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
