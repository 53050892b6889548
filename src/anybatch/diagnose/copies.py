"""Copies of the model that is measured, all alike, and what puts a copy back to where it was."""

import copy
import random
import sys
from collections.abc import Callable

import torch
from torch import nn

from ..convert.snapshot import random_states_kept
from ..errors import AnybatchError
from ..inference.batches import unwrapped
from ..training import history_state_dict, load_history_state_dict

__all__ = ["CALL", "builder", "copier", "rewinder", "seed_all"]

CALL = "diagnose"


def copier(model: nn.Module) -> Callable[[], nn.Module]:
    """What makes copies of the model, without its wrapper and with its history as it is now."""
    model = unwrapped(model)
    history = history_state_dict(model)

    def build() -> nn.Module:
        try:
            twin = copy.deepcopy(model)
        except Exception as error:
            raise AnybatchError(
                f"{CALL}: the model cannot be copied ({type(error).__name__}: {error}); give a function that builds it"
            ) from error
        load_history_state_dict(twin, history)
        return twin

    return build


def builder(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What builds the model anew, the same each time."""
    if not callable(make):
        raise AnybatchError(f"{CALL}: the model is a {type(make).__name__}; give a module, or a function that builds")

    def build() -> nn.Module:
        with random_states_kept():
            seed_all(0)
            model = make()
        if not isinstance(model, nn.Module):
            raise AnybatchError(f"{CALL}: the function built a {type(model).__name__}; it must return a module")
        return unwrapped(model)

    if build() is build():
        raise AnybatchError(f"{CALL}: the function gives the same module each time; give the module itself")
    return build


def rewinder(model: nn.Module) -> Callable[[], None]:
    """What puts the model's buffers and history back to what they are now; its parameters stay."""
    history = history_state_dict(model)
    buffers = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]

    @torch.no_grad()
    def rewind() -> None:
        load_history_state_dict(model, history)
        for module, key, buffer, kept in buffers:  # a buffer may have been replaced
            module._buffers[key] = buffer.copy_(kept)

    return rewind


def seed_all(seed: int) -> None:
    """Seed torch, Python and, where it is in use, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
