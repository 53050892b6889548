"""What a segmentation run depends on."""

from dataclasses import dataclass
from typing import get_args

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.segmentation.examples import Intensity
from anybatch.lab.segmentation.networks import NETWORKS
from anybatch.methods import METHODS

__all__ = ["SegmentConfig"]


@dataclass(frozen=True)
class SegmentConfig(TrainConfig):
    """A run that trains a segmenter, in two or three dimensions as the data have it.

    Attributes:
        lr: for a gradient batch of 8.
        data: "volumes" or "scenes", which are generated; or a folder: of images/ and masks/, or of imagesTr/ and
            labelsTr/ with NIfTI volumes.
        train_examples: only the first so many; None is all. Likewise `test_examples`.
        network: a name in `NETWORKS`.
        width: channels of its first level; each further level has twice as many, up to eight times.
        patch: pixels or voxels a side of what is trained on; None is the data's own: whole generated examples, 128
            pixels of an image, 64 voxels of a volume.
        image_size: pixels a side that images are resized to; None leaves them as they are.
        spacing: millimetres between voxels that volumes are resampled to; None leaves them as they are.
        intensity: what an example is normalised by: its own mean and variance ("example"), or those of all training
            examples ("data"); None is "example" for NIfTI volumes that are no CT, "data" for all else.
    """

    task = "segment"
    measure = "mean Dice"
    lr_batch = 8
    examples = "examples"

    method: str = "cbn"
    data: str = "volumes"
    epochs: int = 8
    lr: float = 0.05
    gradient_batch: int = 8
    train_examples: int | None = None
    test_examples: int | None = None
    network: str = "unet"
    width: int = 8
    patch: int | None = None
    image_size: int | None = None
    spacing: float | None = None
    intensity: Intensity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            raise AnybatchError(f"there is no network '{self.network}': choose one of {', '.join(NETWORKS)}")
        for option, least in (("width", 1), ("train_examples", 1), ("test_examples", 1), ("image_size", 8)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise AnybatchError(f"{option} is {value}: give at least {least}")
        if self.spacing is not None and not self.spacing > 0:
            raise AnybatchError(f"spacing is {self.spacing}: give millimetres, above 0")
        if self.intensity not in (None, *get_args(Intensity)):
            raise AnybatchError(f"there is no intensity '{self.intensity}': choose example or data")
        multiple = NETWORKS[self.network].multiple
        if self.patch is not None and (self.patch < 1 or self.patch % multiple):
            raise AnybatchError(
                f"patch is {self.patch}: {self.network} halves it until {multiple} pixels are one: "
                f"give a multiple of {multiple}"
            )

    def compared(self) -> tuple[str, ...]:
        """What is set side by side if no methods are named."""
        return ("bn", self._typed("gn"), "cbn")

    def all_methods(self) -> tuple[str, ...]:
        """Every method of the table, as typed for few channels where the network has few."""
        return tuple(map(self._typed, METHODS))

    def _typed(self, name: str) -> str:
        return METHODS[name].trial if self.width % 32 else name
