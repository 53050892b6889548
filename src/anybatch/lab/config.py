"""What a run depends on."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from anybatch.errors import AnybatchError
from anybatch.layers.config import NormConfig
from anybatch.methods import parse_method

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on, besides the pixels.

    Attributes:
        method: as `anybatch.methods.parse_method` reads it; a quoted fraction such as '1/3' in it stands for that share
            of the training forwards.
        batch: images that a normalization layer sees at once; divides `gradient_batch`.
        train_images: only the first so many; None is all. Likewise `test_images`.
        lr: for a gradient batch of 32; falls to 0 along a cosine over the run.
        gradient_batch: images per update in mode "accumulate".
        norm_weight_decay: of gamma towards 1 and beta towards 0; None decays them towards 0 as every parameter.
    """

    method: str = "cbn"
    batch: int = 1
    seed: int = 0
    data: str = "embedded"
    train_images: int | None = None
    test_images: int | None = None
    image_size: int = 64
    network: str = "small-resnet"
    epochs: int = 3
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_batch: int = 32
    mode: Literal["accumulate", "step"] = "accumulate"
    device: str = "cpu"
    norm_weight_decay: float | None = None

    def __post_init__(self) -> None:
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

    def facts(self) -> dict[str, Any]:
        """The fields that name a run: options that came later count only where they are used."""
        later = {"norm_weight_decay": None}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def updates(self, train_images: int) -> int:
        """Gradient batches per epoch; the last, partial one is dropped."""
        return train_images // self.gradient_batch

    def resolved_method(self, train_images: int) -> str:
        """`method` with every quoted fraction replaced by that share of the training forwards of `train_images`."""
        forwards = self.epochs * self.updates(train_images) * self.gradient_batch // self.batch
        return re.sub(r"(['\"])(\d+)/(\d+)\1", lambda m: str(forwards * int(m[2]) // int(m[3])), self.method)

    def norm(self, train_images: int) -> NormConfig:
        """The configuration of the normalization layers.

        Raises:
            AnybatchError: there is no such method or option.
        """
        return parse_method(self.resolved_method(train_images))
