"""Accelerate: the histories of a model's layers in what ``accelerator.save_state`` writes.

    accelerator.register_for_checkpointing(History(model))

Nothing of Accelerate is imported: whatever saves objects by ``state_dict`` and ``load_state_dict`` takes one.
"""

from typing import Any

from torch import nn

from ..inference.batches import unwrapped
from ._histories import gather_histories, take_history

__all__ = ["History"]


class History:
    """The history of a model's layers as an object that is saved and loaded; plain tensors, weights-only loadable.

    Args:
        model: converted; before or after ``accelerator.prepare``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """The histories of all processes, each of which calls this."""
        return {"histories": gather_histories("History", unwrapped(self.model))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the own process's; after the model's weights.

        Warns where another number of processes saved them: the past is then gathered anew.

        Raises:
            AnybatchError: it is no such state, or does not fit the model.
        """
        take_history("History", unwrapped(self.model), state.get("histories"))
