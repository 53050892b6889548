"""torch's SyncBatchNorm as something to time: on CUDA, in a process group."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules._functions import SyncBatchNorm as _Synchronise
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.convert.walker import swap
from anybatch.errors import AnybatchError

__all__ = ["SyncBN", "process_group"]


class _Synced(nn.SyncBatchNorm):
    """torch's layer, with its kernels and its collective in a group of one process too, where torch leaves them out."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.num_batches_tracked is None:
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        group = dist.group.WORLD
        return _Synchronise.apply(  # type: ignore[no-any-return,no-untyped-call]
            *(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum),
            *(group, dist.get_world_size(group)),
        )


@dataclass(frozen=True)
class SyncBN:
    """torch's SyncBatchNorm."""

    name: ClassVar[str] = "syncbn"

    @classmethod
    def parse(cls, text: str) -> "SyncBN":
        """From what one types, ``syncbn``.

        Raises:
            AnybatchError: options are given.
        """
        if text.strip().lower() not in (cls.name, f"{cls.name}()"):
            raise AnybatchError(f"method {text!r}: torch's SyncBatchNorm has no options here; write {cls.name}")
        return cls()

    def put_into(self, model: nn.Module, example_inputs: Any) -> None:
        """Put a SyncBatchNorm in place of every BatchNorm.

        Raises:
            AnybatchError: the model is not on CUDA.
        """
        if any(p.device.type != "cuda" for p in model.parameters()):
            raise AnybatchError("torch's SyncBatchNorm takes CUDA tensors only")
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        swap(model, {norm: _like(norm) for norm in norms})


def _like(norm: _BatchNorm) -> _Synced:
    new = _Synced(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters, new._buffers = norm._parameters, norm._buffers
    return new.train(norm.training)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """A process group of this process alone, met on a file, unless there is one."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
