"""What a training configuration is, how one is drawn, and which the library says that it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

import anybatch as ab
from anybatch.methods import parse_method

from .nets import NETS, SHAPES

__all__ = ["Configuration", "configurations", "factors", "refusal"]

# Besides every row of the table as it is.
VARIANTS = (
    "cbn",
    "cbn(window_examples=4)",
    "cbn(window=1)",
    "cbn(window=2)",
    "cbn(window=3, average_reductions=2)",
    "cbn(window=3, gradient='current')",
    "cbn(window=3, expansion='second_moment', pooling='equal')",
    "cbn(window=4, examples_per_group=2)",
    "cbn(window=4, burn_in_steps=2, momentum_batch=None, running='torch')",
    "accumulated(gradient='share')",
    "renorm(ramp_from=1, ramp_to=3)",
    "bgn(groups=4)",
    "ghost(examples_per_group=1)",
    "iebn(shortcuts='converted')",
    "iebn(window=2, shortcuts='converted')",
    "weighed(alpha=0.0)",
)
SYNCED = (
    *("cbn(window=3, sync=True)", "cbn(window=1, sync=True)", "cbn(window=3, compensate=False, sync=True)"),
    "cbn(window=3, gradient='current', pooling='equal', expansion='second_moment', sync=True)",
    *(
        "accumulated(sync=True)",
        "renorm(ramp_from=1, ramp_to=3, sync=True)",
        "bgn(groups=4, sync=True)",
        "weighed(sync=True)",
    ),
    *("iebn(sync=True)", "iebn(window=3, sync=True)", "ghost(examples_per_group=2, sync=True)"),
)
PRECISIONS = ("float32", "float64", "bfloat16", "float16")
CHECKPOINTS = ("none", "whole", "block", "norm", "reentrant whole", "reentrant block", "reentrant norm")
FROZEN = ("none", "norms", "first norm", "affine", "first map")
# A compilation costs as much as thirty configurations without one, inductor's a hundred.
COMPILERS = ("none",) * 40 + ("aot_eager",) * 4 + ("inductor",)


@dataclass(frozen=True)
class Configuration:
    """A few steps of training; its repr makes it again.

    Args:
        method: as typed on the command line.
        net: of nets.py.
        precision: float32 or float64 throughout, or what autocast computes in; float16 with a gradient scaler.
        batches: examples of every step's micro-batches on every rank.
        shapes: of the examples of every step, by their number in nets.py.
        checkpointing: what is run again in the backward.
        compiler: torch.compile's backend, with fullgraph=True.
        broadcast: DistributedDataParallel broadcasts the buffers of rank 0.
        frozen: norms in evaluation mode, or parameters without gradients.
        optimizer: sgd with momentum, or adamw.
        channels_last: in memory.
        seed: of weights and data.
    """

    method: str
    net: str
    precision: str
    batches: tuple[tuple[tuple[int, ...], ...], ...]
    shapes: tuple[int, ...]
    checkpointing: str = "none"
    compiler: str = "none"
    broadcast: bool = False
    frozen: str = "none"
    optimizer: str = "sgd"
    channels_last: bool = False
    seed: int = 0

    @property
    def world(self) -> int:
        """Processes."""
        return len(self.batches[0][0])

    @property
    def synced(self) -> bool:
        """Whether moments are pooled over ranks."""
        return "sync=True" in self.method


def factors(configuration: Configuration) -> dict[str, str]:
    """What is counted of a configuration."""
    counted = {f.name: str(getattr(configuration, f.name)) for f in fields(configuration)}
    del counted["seed"], counted["batches"], counted["shapes"]
    sizes = [n for step in configuration.batches for micro_batch in step for n in micro_batch]
    return counted | {
        "ranks": f"{configuration.world}{' synced' if configuration.synced else ''}",
        "micro-batches": "-".join(sorted({str(len(step)) for step in configuration.batches})),
        "smallest batch": str(min(sizes)),
        "image sizes": str(len(set(configuration.shapes))),
    }


def refusal(configuration: Configuration) -> str | None:
    """What the error says with which the library, or torch, refuses the configuration; None where it is supported."""
    name, _, _ = configuration.method.partition("(")
    if configuration.synced and name == "ghost":
        return "the options of ghost are: examples_per_group"  # docs/methods/ghost.md: no sync
    config = parse_method(configuration.method)
    trains = configuration.frozen not in ("norms", "first norm")
    if configuration.checkpointing == "reentrant norm" and config.needs_map and trains:
        return "not the untouched output"  # docs/training.md, activation checkpointing
    repeated = configuration.checkpointing != "none" and configuration.frozen != "norms"
    if (name == "accumulated" or configuration.method == "bgn") and configuration.compiler != "none" and repeated:
        return "Attempted to mutate"  # docs/training.md: what a compiled checkpoint runs changes tensors alone
    return None


@st.composite
def configurations(draw: Any, compilers: Sequence[str] = COMPILERS) -> Configuration:
    """Every combination that is one: reentrant checkpoints are not compiled, one process has no ranks to sync."""

    def one(values: Sequence[Any]) -> Any:
        return draw(st.sampled_from(values))

    compiler = one(compilers)
    world = one((1, 1, 2)) if compiler != "inductor" else 1
    synced = world > 1 and draw(st.booleans())
    table = tuple(row.trial for row in ab.METHODS.values())
    method = one(SYNCED if synced else table + VARIANTS)
    if method == "bgn" and world > 1:
        method = "bgn(groups=4)"  # settled by each rank's first batch, they would be other layers
    # An example has one value of a vector's channel. Those of two may be next to equal: no precision is enough then.
    net = one(sorted(NETS.keys() - {"linear"} if "examples_per_group" in method else NETS))
    least = 4 if net == "linear" else 1
    sizes = st.integers(0 if synced else least, least + 3)
    micro_batches = st.tuples(*[sizes] * world).filter(lambda parts: sum(parts) >= least)
    steps, most = {"none": (one((3, 4, 5)), 4), "aot_eager": (3, 2), "inductor": (2, 1)}[compiler]
    batches = tuple(tuple(draw(st.lists(micro_batches, min_size=1, max_size=most))) for _ in range(steps))
    shapes = tuple(one(range(len(SHAPES[net]))) for _ in range(steps))
    if compiler == "inductor":  # every new size is compiled
        batches, shapes = batches[:1] * steps, shapes[:1] * steps
    return Configuration(
        method=method,
        net=net,
        precision=one(PRECISIONS),
        batches=batches,
        shapes=shapes,
        checkpointing=one(CHECKPOINTS if compiler == "none" else CHECKPOINTS[:3]),
        compiler=compiler,
        broadcast=world > 1 and draw(st.booleans()),
        frozen=one(FROZEN),
        optimizer=one(("sgd", "adamw")),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
