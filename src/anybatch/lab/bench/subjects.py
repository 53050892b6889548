"""What runs and is timed: training steps, passes through a layer, inference."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.inference import fold
from anybatch.lab import networks
from anybatch.lab.bench.config import COMPILED, FOLDED, FORMATS, GRAPHS, BenchConfig, Row
from anybatch.layers.config import NormConfig
from anybatch.training import attach

__all__ = ["Batches", "Captured", "Inference", "Passes", "Steps", "Subject", "batches_of", "model_of", "subject"]

Batches = Sequence[tuple[Tensor, Tensor]]
CLASSES, CHANNELS, LR = 10, 3, 1e-3
LOSS_SCALE = 2.0**8  # of float16's first steps, which must not overflow: the gate looks at their gradients
BATCHES = 2
WARM_UP = 3


class Steps:
    """The training steps of a model over batches, again and again.

    Args:
        model: converted.
        batches: inputs with labels.
        how: see Row.
        autocast: what autocast computes in; None: there is none.
    """

    def __init__(self, model: nn.Module, batches: Batches, how: str = "", autocast: torch.dtype | None = None) -> None:
        self.model, self.how, self.autocast = model, how, autocast
        self.all = self.batches = batches
        self.done, self.warmed = 0, 0  # steps; and those on the first batch before the others
        if COMPILED in how:
            torch._dynamo.config.recompile_limit = 1000  # all that is compiled here is one forward
            model.compile(fullgraph=True)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=LOSS_SCALE, enabled=autocast == torch.float16)
        attach(model, self.optimizer, self.scaler)

    @property
    def device(self) -> str:
        """Of the batches."""
        return self.batches[0][0].device.type

    def copy(self, dtype: torch.dtype = torch.float32, plain: bool = True) -> "Steps":
        """Those of a copy of the model in ``dtype``, from the first batch on; if ``plain``, eager and not autocast."""
        model = copy.deepcopy(self.model).to(dtype)
        batches = [tuple(_cast(t, dtype if plain else t.dtype) for t in batch) for batch in self.all]
        kind = Steps if plain and type(self) is Captured else type(self)
        return kind(model, batches, "" if plain else self.how, None if plain else self.autocast)  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        """One step; its loss."""
        result = self.compute()
        self.update()
        return result

    def warm(self, steps: int) -> None:
        """Steps on the first batch."""
        for _ in range(steps):
            self.done = 0
            self()
        self.done, self.warmed = 0, self.warmed + steps

    def timed(self) -> None:
        """What is timed of a step."""
        self()

    def between(self) -> None:
        """What is not, after it."""

    def compute(self) -> Tensor:
        """Forward and backward."""
        x, target = self.batches[self.done % len(self.batches)]
        self.done += 1
        self.clear()
        with torch.autocast(
            self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=GRAPHS not in self.how
        ):
            out = self.model(x)
            result: Tensor = out if target.is_floating_point() else F.cross_entropy(out, target)
        weights = target.to(result.dtype) if target.is_floating_point() else None
        self.scaler.scale(result).backward(weights)  # type: ignore[no-untyped-call]
        return result.detach()

    def update(self) -> None:
        """The optimizer's step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
        for x, _ in self.batches:
            x.grad = None

    def gradient(self) -> Tensor | None:
        """Of everything that has one, as one vector in float64; None: nothing is trained.

        Raises:
            AnybatchError: a parameter that trains has none.
        """
        scale = self.scaler.get_scale()  # of which the optimizer's step frees parameters only
        parts = [x.grad.double().flatten() / scale for x, _ in self.batches if x.grad is not None]
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                if p.grad is None:
                    raise AnybatchError(f"'{name}' has no gradient")
                parts.append(p.grad.double().flatten())
        return torch.cat(parts)


class _Layer(nn.Module):
    """A 3x3 convolution and its norm; torch does not compile a Sequential of its own modules alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


class Passes(Steps):
    """Forward and backward of a layer under a random gradient of its output; weights move in between, untimed."""

    def timed(self) -> None:
        """Forward and backward."""
        self.compute()

    def between(self) -> None:
        """The optimizer's step."""
        self.update()


class Captured(Steps):
    """Training steps replayed from a CUDA graph of one; the next batch is copied to where the graph reads it."""

    def __init__(self, model: nn.Module, batches: Batches, how: str = "", autocast: torch.dtype | None = None) -> None:
        super().__init__(model, batches, how, autocast)
        x, target = batches[0]
        self.batches = [(x.detach().clone(), target.clone())]
        self.graph: torch.cuda.CUDAGraph | None = None
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.warm(WARM_UP)
        torch.cuda.current_stream().wait_stream(side)
        self.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = super().__call__()
        self.graph, self.done = graph, 0

    def __call__(self) -> Tensor:
        """One step; its loss."""
        if self.graph is None:
            return super().__call__()
        for at, value in zip(self.batches[0], self.all[self.done % len(self.all)], strict=True):
            at.copy_(value)
        self.done += 1
        self.graph.replay()
        return self.result


class Inference(Steps):
    """Forwards in evaluation mode."""

    def __init__(self, model: nn.Module, batches: Batches, how: str = "", autocast: torch.dtype | None = None) -> None:
        super().__init__(model.eval(), batches, how, autocast)

    def __call__(self) -> Tensor:
        """The output for the next batch."""
        x = self.batches[self.done % len(self.batches)][0]
        self.done += 1
        with torch.no_grad(), torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            return self.model(x)  # type: ignore[no-any-return]

    def gradient(self) -> Tensor | None:
        """None."""
        return None


Subject = Steps


def subject(config: BenchConfig, row: Row, batches: Batches) -> Subject:
    """What runs for a row.

    Raises:
        AnybatchError: the method does not fit the model, the device or the way it shall run.
    """
    norm = config.norm(row.method)
    if config.what == "inference" and not isinstance(norm, NormConfig):
        raise AnybatchError(f"{row.method}: in inference it is BatchNorm, which is timed already")
    model = model_of(config, norm, batches)
    if config.what == "inference":
        training = Steps(model, batches)
        for _ in range(WARM_UP):  # running statistics
            training()
        training.clear()
        if FOLDED in row.how:
            model = fold(model.eval(), example_inputs=batches[0][0])
        return Inference(model, batches, row.how, config.autocast)
    kind: Any = Captured if GRAPHS in row.how else Passes if config.what == "layer" else Steps
    return kind(model, batches, row.how, config.autocast)  # type: ignore[no-any-return]


def model_of(config: BenchConfig, norm: Any, batches: Batches) -> nn.Module:
    """The network, or the layer, with this norm; its weights are always the same."""
    torch.manual_seed(0)
    layer = config.what == "layer"
    model: nn.Module = _Layer(config.channels) if layer else networks.build(config.network, CLASSES, CHANNELS)
    model.to(config.device).to(memory_format=FORMATS[config.format])  # type: ignore[call-overload]
    x = batches[0][0].detach().float()
    if isinstance(norm, NormConfig):
        convert_(model, norm, example_inputs=(x,))
    else:
        norm.put_into(model, x)
    return model.train()


def batches_of(config: BenchConfig) -> Batches:
    """Random images with labels; for a layer its input, which wants a gradient, and the gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    layer = config.what == "layer"
    shape = config.batch, config.channels if layer else CHANNELS, config.image_size, config.image_size
    images = [torch.randn(shape, generator=generator) for _ in range(BATCHES)]
    images = [x.to(config.device, memory_format=FORMATS[config.format]) for x in images]
    if not layer:
        labels = [torch.randint(CLASSES, (config.batch,), generator=generator) for _ in images]
        return [(x, y.to(config.device)) for x, y in zip(images, labels, strict=True)]
    # As an average over positions has it, so that a step of LR is a small one.
    gradients = [
        torch.randn(shape, generator=generator) * (config.batch * config.image_size**2) ** -0.5 for _ in images
    ]
    inside = config.autocast or torch.float32  # the dtype of activations within a network
    return [(_cast(x.requires_grad_(), inside), g.to(x.device, inside)) for x, g in zip(images, gradients, strict=True)]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of its own; labels stay as they are."""
    if not t.is_floating_point():
        return t
    return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
