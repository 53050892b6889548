"""The processes of one run: this one alone, or those that torchrun started together."""

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.errors import AnybatchError

__all__ = ["ALONE", "Processes", "joined", "started"]

PATIENCE = timedelta(hours=3)  # of the others, while the main process evaluates


@dataclass(frozen=True)
class Processes:
    """What one of `count` processes that train together needs of the others; alone it needs nothing of anyone.

    Every method but `part` is called by all of them, at the same point of the run.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that evaluates, prints and writes."""
        return self.rank == 0

    def part(self, tensor: Tensor) -> Tensor:
        """This process's share of the rows."""
        return tensor.tensor_split(self.count)[self.rank]

    def share_gradients(self, model: nn.Module) -> nn.Module:
        """The model to call in training: its gradients are means over the processes."""
        if self.count == 1:
            return model
        # No bucket may hold two parameters: torch puts all into one at first and sorts them anew after a step, and the
        # last bit of a sum over three or more processes depends on the place in the bucket. A resumed run would differ.
        return DistributedDataParallel(model, bucket_cap_mb_list=[0])

    def gradients(self, model: nn.Module, send: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; only with the last of a step the gradients are sent."""
        return nullcontext() if send or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag if self.count == 1 else bool(self._sum(float(flag)))

    def mean(self, value: float) -> float:
        """Of the processes' values."""
        return value if self.count == 1 else self._sum(value) / self.count

    def gather(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's tensors and numbers, in their order, for the main one; for the others nothing."""
        if self.count == 1:
            return [state]
        content = io.BytesIO()
        torch.save(state, content)
        parts = [b""] * self.count if self.is_main else None
        dist.gather_object(content.getvalue(), parts)
        # Through the processor's memory: the main process has no business on the others' accelerators.
        return [torch.load(io.BytesIO(part), map_location="cpu", weights_only=True) for part in parts or ()]

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)


ALONE = Processes()


def started() -> int:
    """Processes that torchrun started together, this one among them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined for as long as the context lasts; ALONE without torchrun.

    "cuda" is then each process's own accelerator.

    Raises:
        AnybatchError: there are several processes, and `device` names one accelerator for all of them, or one that
            this machine has too few of.
    """
    count = started()
    if count == 1:
        yield ALONE
        return
    if device.startswith("cuda"):
        _take_accelerator(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def _take_accelerator(device: str) -> None:
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cuda" or local >= there:
        raise AnybatchError(
            f"device '{device}' for process {local + 1} of a machine with {there} accelerators: give --device cuda, "
            f"and start at most {there} processes"
        )
    torch.cuda.set_device(local)
