"""Which ranks a layer pools its moments over in training."""

from typing import Any

import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.ranks import Group
from ..errors import AnybatchError

__all__ = ["SyncedLayer"]

_LOST = "that of the layer this one was copied from"


class SyncedLayer(_BatchNorm):
    """A layer that pools the moments of a batch over ranks where ``sync`` says so. All of them call it, or none."""

    sync: bool = False
    process_group: Any = None  # torch.distributed's default group

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles cannot take a process group along."""
        return {**self.__dict__, "process_group": None if self.process_group is None else _LOST}

    @property
    def group(self) -> Group:
        """The ranks that training pools moments over; None for this process alone.

        Raises:
            AnybatchError: the layer is a copy of one with a group of its own.
        """
        if not self.sync or not dist.is_available() or not dist.is_initialized():
            return None
        if self.process_group == _LOST:
            raise AnybatchError(f"{type(self).__name__}: a copy does not take its process_group along; set it anew")
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None
