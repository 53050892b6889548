"""What a run depends on: what every training takes, and what classification adds."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

from anybatch.errors import AnybatchError
from anybatch.lab import networks
from anybatch.lab.processes import started
from anybatch.layers.config import NormConfig
from anybatch.methods import METHODS, parse_method
from anybatch.typed import split_method, tidy_method, write_method

__all__ = ["ClassifyConfig", "TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on, besides the data itself; each task adds fields of its own.

    Attributes:
        method: as `anybatch.methods.parse_method` reads it, but that burn_in_steps may be a quoted fraction, '1/3', for
            that share of the training forwards, of which each of several processes has its part, and
            average_reductions 'step', for the forwards of one step of the optimizer.
        batch: examples that a normalization layer sees at once; divides `gradient_batch`.
        lr: for a gradient batch of `lr_batch`; falls to 0 along a cosine over the run, unless there are `milestones`.
        gradient_batch: examples per update in mode "accumulate".
        norm_weight_decay: of gamma towards 1 and beta towards 0; None decays them towards 0 as every parameter.
        milestones: epochs after which the learning rate is divided by 10, and constant otherwise.
        clip: the largest norm of all gradients together that a step takes; None takes any.
        warmup_steps: of the optimizer, over which the rate rises along a line, from `warmup_start` of itself.
    """

    task: ClassVar[str]  # its name, in records and checkpoints
    measure: ClassVar[str]  # what the score of a run is, in percent
    lr_batch: ClassVar[int]
    examples: ClassVar[str] = "images"

    method: str = "cbn"
    batch: int = 1
    seed: int = 0
    data: str = ""
    epochs: int = 3
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_batch: int = 32
    mode: Literal["accumulate", "step"] = "accumulate"
    device: str = "cpu"
    norm_weight_decay: float | None = None
    milestones: tuple[int, ...] = ()
    warmup_steps: int = 0
    warmup_start: float = 0.001
    clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # JSON and TOML have lists
        object.__setattr__(self, "method", tidy_method(self.method))
        if self.batch < 1 or self.gradient_batch % self.batch:
            divisors = [str(b) for b in range(1, self.gradient_batch + 1) if self.gradient_batch % b == 0]
            raise AnybatchError(
                f"batch {self.batch} does not divide the gradient batch {self.gradient_batch}: "
                f"choose one of {', '.join(divisors)}"
            )
        if self.epochs < 1:
            raise AnybatchError(f"epochs is {self.epochs}: give at least 1")
        if not self.lr > 0:
            raise AnybatchError(f"lr is {self.lr}: give a number above 0")
        if self.norm_weight_decay is not None and not self.norm_weight_decay >= 0:
            raise AnybatchError(f"norm_weight_decay is {self.norm_weight_decay}: give a number of at least 0")
        if self.mode not in ("accumulate", "step"):
            raise AnybatchError(f"there is no mode '{self.mode}': choose accumulate or step")
        ends = (0, *self.milestones, self.epochs)
        if self.milestones and any(after <= before for before, after in pairwise(ends)):
            raise AnybatchError(
                f"milestones are {self.milestones} in a run of {self.epochs} epochs: give them in ascending order, "
                f"each within the run, or train for more epochs"
            )
        if self.clip is not None and not self.clip > 0:
            raise AnybatchError(f"clip is {self.clip}: give a number above 0")
        if self.warmup_steps < 0:
            raise AnybatchError(f"warmup_steps is {self.warmup_steps}: give at least 0")
        if not 0 < self.warmup_start <= 1:
            raise AnybatchError(f"warmup_start is {self.warmup_start}: give a share of the rate, above 0 and at most 1")

    def record(self) -> dict[str, Any]:
        """As plain values, with the name of the task; `anybatch.lab.tasks.config_of` reads it."""
        return {"task": self.task, **asdict(self)}

    def facts(self) -> dict[str, Any]:
        """The values that name a run: those that came later count only where they are used."""
        later = {
            "norm_weight_decay": None,
            "task": "classify",
            "milestones": (),
            "warmup_steps": 0,
            "clip": None,
            "warmup_start": self.warmup_start if self.warmup_steps == 0 else None,
            "augment": False,
        }
        record = self.record()
        record.pop("at_once", None)  # how a run is made, and not which
        return {name: value for name, value in record.items() if name not in later or value != later[name]}

    def updates(self, examples: int) -> int:
        """Gradient batches per epoch; the last, partial one is dropped."""
        return examples // self.gradient_batch

    def all_methods(self) -> tuple[str, ...]:
        """Every method of the table, as typed."""
        return tuple(METHODS)

    def whole(self, norm: NormConfig) -> NormConfig | None:
        """What stands for `norm` where an update's micro-batches are given at once; None: each goes by itself."""
        return None

    def norm(self, examples: int) -> NormConfig:
        """The configuration of the normalization layers.

        Raises:
            AnybatchError: there is no such method or option.
        """
        return self.parse(self.method, examples)

    def parse(self, method: str, examples: int) -> NormConfig:
        """As `norm`, of any method as typed."""
        return parse_method(self.resolved(method, examples))

    def resolved(self, method: str, examples: int) -> str:
        """A method with a burn-in in shares, and reductions averaged over a 'step', in forwards of a run.

        Each group of a batch that is taken in groups is a forward.

        Args:
            method: as typed.
            examples: that the run trains on.

        Raises:
            AnybatchError: a share that is none.
        """
        name, options = split_method(method)
        group = options.get("examples_per_group")
        groups = -(-self.batch // group) if isinstance(group, int) and 0 < group < self.batch else 1
        forwards = max(1, self.gradient_batch // (self.batch * started())) * groups  # over an update's examples
        if options.get("average_reductions") == "step":
            options["average_reductions"] = forwards if self.mode == "accumulate" else groups
        if isinstance(share := options.get("burn_in_steps"), str):
            part, _, whole = share.partition("/")
            if not (part.isdecimal() and whole.isdecimal() and int(part) <= int(whole) > 0):
                raise AnybatchError(
                    f"method {method!r}: burn_in_steps={share!r} is no share of a run: write it as a fraction, at most "
                    "one, as '1/3'"
                )
            options["burn_in_steps"] = self.epochs * self.updates(examples) * forwards * int(part) // int(whole)
        return write_method(name, options)


@dataclass(frozen=True)
class ClassifyConfig(TrainConfig):
    """A run that trains a classifier.

    Attributes:
        train_images: only the first so many; None is all. Likewise `test_images`.
        image_size: pixels a side that the images of a folder are resized to.
        augment: shift training images by up to four pixels, and mirror half of them.
        at_once: on a CPU, give the network the micro-batches of an update at once where its method makes the same of
            them so, as one that sees one example at a time does, and CBN in groups: one forward in place of many.
    """

    task = "classify"
    measure = "test accuracy"
    lr_batch = 32

    data: str = "embedded"
    train_images: int | None = None
    test_images: int | None = None
    image_size: int = 64
    network: str = "small-resnet"
    augment: bool = False
    at_once: bool = field(default=False, compare=False)

    def all_methods(self) -> tuple[str, ...]:
        """Every method of the table, as typed, with options that fit the network's channels."""
        return networks.all_methods(self.network)

    def whole(self, norm: NormConfig) -> NormConfig | None:
        """As its method has it in groups, with `at_once`."""
        several = self.mode == "accumulate" and self.batch < self.gradient_batch
        return norm.in_groups(self.batch) if self.at_once and several and self.device == "cpu" else None
