"""What is timed."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from anybatch.errors import AnybatchError
from anybatch.lab import networks
from anybatch.lab.bench.synced import SyncBN
from anybatch.lab.released import NAME, Released
from anybatch.methods import METHODS, parse_method
from anybatch.typed import split_method

__all__ = ["COMPILED", "DTYPES", "FOLDED", "FORMATS", "GRAPHS", "REFERENCE", "WHAT", "BenchConfig", "Row"]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHAT = ("step", "layer", "inference")
REFERENCE = "bn"
COMPILED, GRAPHS, FOLDED = "compiled", "CUDA graph", "folded"


@dataclass(frozen=True)
class Row:
    """A method, and how it runs: as it is (""), compiled, as a CUDA graph, folded, or "folded, compiled"."""

    method: str
    how: str = ""


@dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Attributes:
        methods: as `anybatch.methods.parse_method` reads them; "released", the authors' way; "syncbn", torch's
            SyncBatchNorm; or "all". The reference need not be among them.
        what: "step", training steps of the network (forward, backward, SGD); "layer", forward and backward of one 3x3
            convolution and its norm; "inference", forwards of the network in evaluation mode, folded too.
        channels: of the layer, in and out.
        image_size: pixels a side, of the layer's input too.
        window: of every method that pools over one, instead of its own; a window of 1 stays.
        rounds: turns of every method, of one step, or as many as take 20 ms.
        dtype: "float32", or what autocast computes in; float16 with a gradient scaler.
        format: of images and weights, "contiguous" or "channels_last".
        compile: time every method compiled too, in one graph (torch.compile, fullgraph=True).
        cuda_graphs: time every method as a CUDA graph too.
    """

    methods: tuple[str, ...] = ("all",)
    what: str = "step"
    network: str = "resnet18"
    channels: int = 64
    image_size: int = 64
    batch: int = 4
    window: int | None = None
    rounds: int = 15
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "contiguous"
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        networks.check_network(self.network)
        choices = {"format": tuple(FORMATS), "dtype": tuple(DTYPES), "what": WHAT}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise AnybatchError(f"there is no {name} '{getattr(self, name)}': choose {' or '.join(known)}")
        least = {"batch": 1, "rounds": 2, "threads": 1, "channels": 1, "image_size": 1 if self.what == "layer" else 8}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise AnybatchError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give at least {smallest}")
        if self.cuda_graphs and not self.device.startswith("cuda"):
            raise AnybatchError(f"CUDA graphs on device '{self.device}': give --device cuda, or no --cuda-graphs")
        if self.cuda_graphs and self.dtype == "float16":
            raise AnybatchError("CUDA graphs in float16: its gradient scaler waits for the device; take bfloat16")

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in; None: there is none."""
        return None if self.dtype == "float32" else DTYPES[self.dtype]

    def norm(self, method: str) -> Any:
        """What a method is: a NormConfig, Released or SyncBN.

        Raises:
            AnybatchError: there is no such method or option.
        """
        name = split_method(method)[0]
        own = {NAME: Released.parse, SyncBN.name: SyncBN.parse}
        norm: Any = own[name](method) if name in own else parse_method(method)
        if self.window is None or getattr(norm, "window", 1) == 1:
            return norm
        return type(norm)(**{f.name: getattr(norm, f.name) for f in fields(norm)} | {"window": self.window})

    def rows(self) -> list[Row]:
        """Every method once in each of its ways, the reference first."""
        given = [m for text in self.methods for m in (self._all() if text == "all" else (text,))]
        ways = ["", *([COMPILED] if self.compile else []), *([GRAPHS] if self.cuda_graphs else [])]
        return [
            Row(method, ", ".join(filter(None, (first, way))))
            for method in dict.fromkeys([REFERENCE, *given])
            for first in (["", FOLDED] if self.what == "inference" and _folds(method) else [""])
            for way in ways
        ]

    def _all(self) -> tuple[str, ...]:
        table = networks.all_methods(self.network)
        if self.what == "layer":
            table = tuple(row.trial if self.channels % 32 else row.name for row in METHODS.values())
        return table if self.what == "inference" else (*table, NAME, SyncBN.name)


def _folds(method: str) -> bool:
    row = METHODS.get(split_method(method)[0])
    return row is not None and row.foldable
