"""Work that every rank of a process group does on its own, and whose results all of them need."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import AnybatchError

__all__ = ["on_every_rank", "ranks_in"]

T = TypeVar("T")


def ranks_in(call: str, sync: bool, process_group: Any) -> Any:
    """The group of ranks to work with, by default torch's; None for this process alone.

    Raises:
        AnybatchError: this rank is none of the group's.
    """
    if not sync or not dist.is_available() or not dist.is_initialized():
        return None
    group = process_group or dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise AnybatchError(
            f"{call}: rank {dist.get_rank()} is not in process_group; call it on that group's ranks, or with sync=False"
        )
    return group if dist.get_world_size(group) > 1 else None


def on_every_rank(call: str, work: Callable[[], T], group: Any) -> list[T]:
    """What ``work`` returned on each rank of ``group``; if it raised on one of them, no rank gets anything.

    One exchange at the end, so that the ranks may have unequal amounts of work. An interruption is none of the errors
    that the others are told of: whoever stops one rank stops them all.

    Args:
        call: the public function's name.
        work: its result must pickle, and be on the CPU.
        group: the ranks, which all take part; None for this process alone.

    Raises:
        AnybatchError: it raised on another rank, the first of which is named. Its own error is raised as it is.
    """
    if group is None:
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (result, failure and f"{type(failure).__name__}: {failure}"), group)
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(answers):
        if said:
            raise AnybatchError(f"{call}: rank {dist.get_global_rank(group, rank)} raised {said}")
    return [result for result, _ in answers]
