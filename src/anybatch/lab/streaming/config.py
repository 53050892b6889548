"""What a run depends on that trains a classifier from files."""

from dataclasses import dataclass

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig

__all__ = ["StreamConfig"]


@dataclass(frozen=True)
class StreamConfig(TrainConfig):
    """A run that trains a classifier of torchvision's on images read from files, step by step.

    Attributes:
        lr: for a gradient batch of 256.
        data: a folder with train/CLASS/ and val/CLASS/.
        network: a classifier of torchvision's, by name.
        image_size: pixels a side that the network sees.
        label_smoothing: share of the target spread over all classes, in training.
    """

    task = "classify-folder"
    measure = "top-1 accuracy"
    lr_batch = 256

    data: str = "imagenet"
    epochs: int = 90
    weight_decay: float = 1e-4
    gradient_batch: int = 256
    network: str = "resnet50"
    image_size: int = 224
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 8:
            raise AnybatchError(f"image_size is {self.image_size}: give at least 8")
        if not 0 <= self.label_smoothing < 1:
            raise AnybatchError(f"label_smoothing is {self.label_smoothing}: give a share from 0 to below 1")
