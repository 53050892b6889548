"""The history of a model's layers, saved beside the optimizer's state: plain tensors, weights-only loadable."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..errors import AnybatchError

__all__ = ["history_state_dict", "load_history_state_dict"]

_VERSION = 1


@runtime_checkable
class Remembers(Protocol):
    """A layer with training state outside of its state_dict, saved by :func:`anybatch.history_state_dict`."""

    histories: dict[int, Any]

    def history_state(self) -> dict[str, Any]:
        """Copies of the state, as plain tensors by name."""

    def read_history_state(self, state: Mapping[str, Any], where: str) -> dict[int, Any]:
        """The histories in such a state, checked against the layer ``where``; assigned to ``histories`` they go on."""


def history_state_dict(model: nn.Module) -> dict[str, Any]:
    """Everything besides ``model.state_dict()`` that training goes on from: ``{"version", "layers": {name: ...}}``.

    Tensors are copies. With the model's and the optimizer's state, resuming is bit-identical to not having stopped.
    """
    layers = {name: module.history_state() for name, module in model.named_modules() if isinstance(module, Remembers)}
    return {"version": _VERSION, "layers": layers}


def load_history_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take up the history that :func:`history_state_dict` saved. All or nothing.

    Raises:
        AnybatchError: the state is of another version, names other layers than the model has, or does not fit them.
    """
    if (
        not isinstance(state, Mapping)
        or state.get("version") != _VERSION
        or not isinstance(state.get("layers"), Mapping)
    ):
        got = f"its version is {state.get('version')!r}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise AnybatchError(
            f"load_history_state_dict: not a history of version {_VERSION} ({got}); save it with history_state_dict"
        )
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Remembers)}
    saved = state["layers"]
    if set(saved) != set(modules):
        only_saved, only_model = sorted(set(saved) - set(modules)), sorted(set(modules) - set(saved))
        raise AnybatchError(
            f"load_history_state_dict: the state has layers {only_saved} that the model has not, and the model "
            f"{only_model} that the state has not; convert the model as it was converted when the state was saved"
        )
    histories = {name: modules[name].read_history_state(saved[name], name) for name in saved}
    for name, history in histories.items():
        modules[name].histories = history
