"""What differs between one kind of training and another: its examples, its model, its loss and its measure."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from anybatch.lab.config import TrainConfig

__all__ = ["Scores", "Split", "Task"]

C = TypeVar("C", bound=TrainConfig, covariant=True)
Split = Literal["train", "test"]


class Scores(NamedTuple):
    """What a model is worth, in evaluation mode.

    Attributes:
        score: what `config.measure` names, in percent; None where it is not taken.
        loss: mean over the examples; None if it is not finite or not taken.
        more: further measures by name, in percent.
    """

    score: float | None
    loss: float | None = None
    more: dict[str, float] = {}  # noqa: RUF012


class Task(ABC, Generic[C]):
    """One configuration on its data. A batch is whatever the task makes of examples: only itself looks into it.

    Attributes:
        config: of the run.
        fingerprint: of the data: hexadecimal digits that change with any example.
        train_count: training examples that there are.
        notes: what of the data a user should know, a line each.
        conversion: what `build` did to every norm, as text; empty before it, and where a task does not say.
    """

    config: C
    fingerprint: str
    train_count: int
    notes: tuple[str, ...] = ()
    conversion: str = ""

    @abstractmethod
    def other(self, config: Any) -> "Task[C]":
        """The same data under another configuration, one that names the same data."""

    @abstractmethod
    def norm(self) -> str:
        """What the method resolves to, for the record."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with its method, initialised from the seed, on its device, in training mode."""

    @abstractmethod
    def batch(self, indices: Tensor, seen: int) -> Any:
        """The training examples of these indices, on the device; `seen` were trained on before this step."""

    def batches(self, indices: Tensor, count: int, seen: int) -> list[Any]:
        """The micro-batches of a step."""
        return [self.batch(part, seen) for part in indices.chunk(count)]

    def expect(self, indices: Tensor, seen: int) -> None:
        """Told what the next `batches` will be asked for, before the step that comes first: time to read ahead."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean over the examples of a batch; the model is in training mode."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split) -> Scores:
        """Puts the model into evaluation mode and measures it."""

    @abstractmethod
    def generated(self, count: int) -> Any:
        """A batch of random examples of the real shape: the data are not touched."""

    @abstractmethod
    def example(self) -> Any:
        """One example as evaluation gives it to a model, on the CPU: a tensor, or a tuple of arguments."""

    def stand_in(self, images: int) -> None:
        """Goes on without the data, as a dry run may, as if there were so many training images."""
        self.train_count = images
        self.notes += (f"there is no data folder '{self.config.data}': {images:,} training images, as the recipe says",)

    def show(self, model: nn.Module, folder: Path) -> dict[str, str]:
        """Pictures of what a trained model does: names of SVG or PNG files in `folder`, by caption."""
        return {}
