"""An example run of a model, and what it may move there, put back afterwards: modes, buffers, random states."""

import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..core.tensors import version
from ..errors import AnybatchError

__all__ = ["random_states_kept", "run_example", "untouched"]


def run_example(
    model: nn.Module, watch: AbstractContextManager[Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The output of one run of the model in its own mode, its norms evaluating, under ``watch``; within ``untouched``.

    Raises:
        AnybatchError: the model raises on these inputs.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False  # a single value per channel must not raise
    try:
        # One reading of a parametrized weight, so that a check sees the weight that made the output.
        with watch, parametrize.cached():
            return model(*args, **kwargs)
    except Exception as error:
        mode = "training" if model.training else "evaluation"
        raise AnybatchError(
            f"the example run of the model, in {mode} mode, raised {type(error).__name__}: {error}. "
            "example_inputs must be what the model's forward takes: a tensor, a tuple of arguments, a dict of "
            "keyword arguments, or (tuple, dict)"
        ) from error


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, torch's and, where it is in use, numpy's random states, on the CPU and the GPUs, put back."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the body without gradients or warnings, then restore modes, buffers and random states, also on an error.

    Args:
        model: whose modules are restored. Buffers that the body added stay.

    Raises:
        AnybatchError: the model has uninitialised lazy modules.
    """
    if any(is_lazy(p) for p in [*model.parameters(), *model.buffers()]):
        raise AnybatchError("the model has uninitialised lazy modules: run one forward of it first")
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    saved = [None if buffer is None else (version(buffer), buffer.clone()) for _, _, buffer in buffers]
    try:
        # Warnings are about the user's model: the user sees them in the user's own runs.
        with torch.no_grad(), random_states_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, training in modes:
            module.training = training
        for (module, name, buffer), copy in zip(buffers, saved, strict=True):
            module._buffers[name] = buffer
            # Unchanged buffers are not written: some are expanded views that cannot be.
            if buffer is not None and copy is not None and copy[0] != version(buffer):
                with torch.no_grad():
                    buffer.copy_(copy[1])
