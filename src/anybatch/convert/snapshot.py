"""What an example run may move in a model, put back afterwards: modes, buffers, random states."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the body without gradients or warnings, then restore modes, buffers and random states, also on an error.

    Args:
        model: whose modules are restored. Buffers that the body added stay.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    saved = [None if buffer is None else (_version(buffer), buffer.clone()) for _, _, buffer in buffers]
    gpus = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    python_state = random.getstate()
    try:
        # Warnings are about the user's model: the user sees them in the user's own runs.
        with torch.no_grad(), torch.random.fork_rng(sorted(d.index for d in gpus)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        for module, training in modes:
            module.training = training
        for (module, name, buffer), copy in zip(buffers, saved, strict=True):
            module._buffers[name] = buffer
            if buffer is not None and copy is not None and copy[0] != _version(buffer):
                with torch.no_grad():
                    buffer.copy_(copy[1])


def _version(buffer: Tensor) -> int:
    """Counts in-place changes. Unchanged buffers are not written: some are expanded views that cannot be."""
    return 0 if buffer.is_inference() else buffer._version
