"""The histories of all processes in one checkpoint: each has its own, and the first writes for all."""

import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import AnybatchError
from ..inference.ranks import on_every_rank, ranks_in
from ..training import history_state_dict, load_history_state_dict

__all__ = ["gather_histories", "take_history"]


def gather_histories(call: str, model: nn.Module) -> list[dict[str, Any]]:
    """A history a process, in the order of ranks, on the CPU; every process calls this."""
    own = tree_map_only(Tensor, Tensor.cpu, history_state_dict(model))
    return on_every_rank(call, lambda: own, ranks_in(call, True, None))


def take_history(call: str, model: nn.Module, histories: Any) -> None:
    """Go on from what :func:`gather_histories` gave, each process from its own.

    Warns, and leaves the model as it is, where another number of processes saved them.

    Raises:
        AnybatchError: it is no such list, or the own history does not fit the model.
    """
    if not isinstance(histories, list):
        raise AnybatchError(
            f"{call}: a {type(histories).__name__} is no list of histories, one a process; save the checkpoint anew"
        )
    group = ranks_in(call, True, None)
    rank, processes = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if processes != len(histories):
        warnings.warn(
            f"{call}: {len(histories)} process(es) saved their histories, and {processes} go on: the histories are "
            "left out, and the past is gathered anew",
            stacklevel=3,
        )
        return
    load_history_state_dict(model, histories[rank])
