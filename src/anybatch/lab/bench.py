"""What a training step costs with each method, relative to torch's BatchNorm.

All methods are timed in one process, one step each a round in shuffled order, and a ratio is taken within its round:
what slows the machine slows both of its sides. No method is timed before its steps agree with float64's.
"""

import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.lab import machine, networks
from anybatch.lab.files import write_atomically
from anybatch.methods import parse_method
from anybatch.training import attach

__all__ = ["FORMATS", "TIMINGS", "BenchConfig", "Steps", "Timing", "bench", "disagreement", "save"]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
REFERENCE = "bn"
COMPILED = ", compiled"  # after a method's name
TIMINGS = "bench.jsonl"
CLASSES, CHANNELS, LR = 10, 3, 1e-3
WARM_UP = 3
# The gate: steps compared, so that what a method remembers of one is used in the next; and how far float32 may be off.
# Rounding alone is some 1e-6 of a gradient; with a ReLU that it turns on or off, up to 2e-2 (one image of 32 pixels).
GATE_STEPS = 2
LOSS_WITHIN, GRADIENT_WITHIN = 1e-3, 5e-2


@dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    Attributes:
        methods: as `anybatch.methods.parse_method` reads them, or "all"; the reference need not be among them.
        rounds: steps timed of every method.
        format: of images and weights, "contiguous" or "channels_last".
        compile: time every method's step compiled too, in one graph (torch.compile, fullgraph=True).
    """

    methods: tuple[str, ...] = ("all",)
    network: str = "resnet18"
    image_size: int = 64
    batch: int = 4
    rounds: int = 15
    threads: int = 1
    device: str = "cpu"
    format: str = "contiguous"
    compile: bool = False

    def __post_init__(self) -> None:
        networks.check_network(self.network)
        if self.format not in FORMATS:
            raise AnybatchError(f"there is no format '{self.format}': choose {' or '.join(FORMATS)}")
        for name, least in {"batch": 1, "rounds": 2, "threads": 1, "image_size": 8}.items():
            if getattr(self, name) < least:
                raise AnybatchError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give at least {least}")

    def each(self) -> list[str]:
        """Every method once, the reference first."""
        given = [m for text in self.methods for m in (networks.all_methods(self.network) if text == "all" else (text,))]
        methods = list(dict.fromkeys([REFERENCE, *given]))
        return [name for m in methods for name in (m, m + COMPILED)] if self.compile else methods


@dataclass(frozen=True)
class Timing:
    """What came of one method.

    Attributes:
        norm: what it resolves to.
        seconds: of its steps, a round each; none if it was refused.
        ratios: to the reference's step of the same round.
        refused: why it was not timed.
    """

    method: str
    norm: str
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    refused: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: 25 %, median, 75 %."""
        low, middle, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, middle, high

    @property
    def milliseconds(self) -> float:
        """Median of a step."""
        return 1e3 * median(self.seconds)


Batches = Sequence[tuple[Tensor, Tensor]]


class Steps:
    """The training steps of a model over batches, again and again."""

    def __init__(self, model: nn.Module, batches: Batches, compiled: bool = False) -> None:
        self.model, self.batches, self.done, self.compiled = model, batches, 0, compiled
        if compiled:
            torch._dynamo.config.recompile_limit = 1000  # all that is compiled here is one forward
            model.compile(fullgraph=True)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attach(model, self.optimizer)

    def copy(self, dtype: torch.dtype) -> "Steps":
        """Those of a copy of the model in ``dtype``, from the first batch on; in float64 never compiled."""
        batches = [(x.to(dtype), y) for x, y in self.batches]
        return Steps(copy.deepcopy(self.model).to(dtype), batches, self.compiled and dtype == torch.float32)

    def __call__(self) -> Tensor:
        """One step; its loss."""
        x, y = self.batches[self.done % len(self.batches)]
        self.done += 1
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        """Of everything that trains, as one vector in float64.

        Raises:
            AnybatchError: a parameter has none.
        """
        parts = []
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                if p.grad is None:
                    raise AnybatchError(f"'{name}' has no gradient")
                parts.append(p.grad.double().flatten())
        return torch.cat(parts)


def disagreement(steps: Steps) -> str:
    """How steps from here on differ from the same in float64; empty if they agree."""
    single, double = steps.copy(torch.float32), steps.copy(torch.float64)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for step in range(1, GATE_STEPS + 1):
            loss, wanted = single().double(), double()
            try:
                gradient, wanted_gradient = single.gradient(), double.gradient()
            except AnybatchError as error:
                return f"step {step}: {error}"
            loss_off = float((loss - wanted).abs() / wanted.abs())
            gradient_off = float((gradient - wanted_gradient).norm() / wanted_gradient.norm())
            for what, off, within in (("loss", loss_off, LOSS_WITHIN), ("gradient", gradient_off, GRADIENT_WITHIN)):
                if not off <= within:
                    return f"step {step}: the {what} is off float64's by {off:.1e} of it, more than {within:g}"
    return ""


def bench(config: BenchConfig, progress: Callable[[int, int], None] | None = None) -> list[Timing]:
    """Times every method that passes the gate, in the order of ``config.each()``.

    Args:
        config: what to time.
        progress: called with the steps done and their total, gates and warm-ups included.

    Raises:
        AnybatchError: a method is unknown, or the reference does not pass the gate.
    """
    machine.check_device(config.device)
    norms = {method: repr(parse_method(method.removesuffix(COMPILED))) for method in config.each()}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _bench(config, norms, progress or (lambda done, total: None))
    finally:
        torch.set_num_threads(threads)


def _bench(config: BenchConfig, norms: dict[str, str], progress: Callable[[int, int], None]) -> list[Timing]:
    batches = _batches(config)
    refused: dict[str, str] = {}
    timed: dict[str, Steps] = {}
    total = (2 * GATE_STEPS + WARM_UP + config.rounds) * len(norms)
    for place, method in enumerate(norms):
        try:
            model = _model(config, method.removesuffix(COMPILED), batches)
            steps = Steps(model, batches, method.endswith(COMPILED))
            refused[method] = disagreement(steps)
        except (AnybatchError, ValueError) as error:  # torch's: a single value per channel
            refused[method] = str(error)
        if not refused[method]:
            timed[method] = steps
            for _ in range(WARM_UP):
                steps()
        progress((place + 1) * (2 * GATE_STEPS + WARM_UP), total)
    if REFERENCE not in timed:
        raise AnybatchError(f"BatchNorm itself does not pass: {refused[REFERENCE]}; try another --device or --batch")
    seconds: dict[str, list[float]] = {method: [] for method in timed}
    order, shuffle = list(timed), random.Random(0).shuffle
    for number in range(config.rounds):
        shuffle(order)
        for method in order:
            seconds[method].append(_time(timed[method], config.device))
        progress(total - (config.rounds - 1 - number) * len(norms), total)
    reference = seconds[REFERENCE]
    return [
        Timing(
            method,
            norm,
            tuple(seconds.get(method, ())),
            tuple(a / b for a, b in zip(seconds.get(method, reference), reference, strict=True) if method in timed),
            refused[method],
        )
        for method, norm in norms.items()
    ]


def _model(config: BenchConfig, method: str, batches: Batches) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = networks.build(config.network, CLASSES, CHANNELS).to(config.device)
    model.to(memory_format=FORMATS[config.format])  # type: ignore[call-overload]
    convert_(model, parse_method(method), example_inputs=(batches[0][0],))
    return model.train()


def _batches(config: BenchConfig) -> Batches:
    generator = torch.Generator().manual_seed(1)
    shape = config.batch, CHANNELS, config.image_size, config.image_size
    images = [torch.randn(shape, generator=generator) for _ in range(GATE_STEPS)]
    labels = [torch.randint(CLASSES, (config.batch,), generator=generator) for _ in images]
    return [
        (x.to(config.device, memory_format=FORMATS[config.format]), y.to(config.device))
        for x, y in zip(images, labels, strict=True)
    ]


def _time(steps: Steps, device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    steps()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def save(folder: Path, config: BenchConfig, timings: Sequence[Timing], command: str) -> Path:
    """Adds to bench.jsonl: a line on the machine and the settings, then one a method.

    Raises:
        AnybatchError: the file cannot be written; what it had is safe.
    """
    head: dict[str, Any] = {
        "machine": machine.machine(config.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "command": command,
    }
    lines = [json.dumps(line) for line in (head, *map(asdict, timings))]
    path = folder / TIMINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise AnybatchError(f"cannot write {path} ({error.strerror or error}): mend it or give --out") from error
    return path
