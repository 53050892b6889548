"""What a detection run depends on."""

from dataclasses import dataclass

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.detection.detectors import DETECTORS
from anybatch.lab.detection.networks import NETWORKS
from anybatch.methods import METHODS

__all__ = ["BEST_CBN", "FROZEN", "NONE", "DetectConfig"]

FROZEN, NONE, METHOD = "frozen", "none", "method"
BEST_CBN = "cbn(average_reductions='step')"  # what was measured: docs/results/detect.md


@dataclass(frozen=True)
class DetectConfig(TrainConfig):
    """A run that trains a detector.

    Attributes:
        method: of the parts that say "method". Besides the table: "frozen", as detectors are trained most: norms of the
            backbone fixed, no norm in neck and heads.
        lr: for a gradient batch of 8.
        data: "scenes", or a folder with COCO-format annotations.
        scenes: of the generated data: how many to train on; they are 1/3 as many to test on.
        detector: a name in `DETECTORS`; network: one in `NETWORKS`.
        weights: of the backbone: "none"; "garments", trained on those of the scenes, for the small network;
            "imagenet", torchvision's; or a file of a state_dict.
        backbone: "frozen", "method", or a method of the table; "" for the network's default: frozen, as in the paper,
            but for the small one, where it is the method. Likewise `neck` and `heads`, "none" for no norm.
        image_size: pixels of an image's shorter side; None keeps that of the scenes, and is 800 elsewhere.
        drop_invalid: leave unusable annotations out, counted, instead of refusing the file.
        flip: mirror half of the training images.
    """

    task = "detect"
    measure = "AP50"
    lr_batch = 8

    method: str = BEST_CBN
    data: str = "scenes"
    lr: float = 0.04
    weight_decay: float = 1e-4
    gradient_batch: int = 8
    epochs: int = 8
    warmup_steps: int = 50
    scenes: int = 600
    detector: str = "faster-rcnn"
    network: str = "small-resnet"
    weights: str = "garments"
    backbone: str = ""
    neck: str = METHOD
    heads: str = METHOD
    image_size: int | None = None
    drop_invalid: bool = False
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, known in (("detector", self.detector, DETECTORS), ("network", self.network, NETWORKS)):
            if value not in known:
                raise AnybatchError(f"there is no {option} '{value}': choose one of {', '.join(known)}")
        if not self.backbone:
            object.__setattr__(self, "backbone", METHOD if NETWORKS[self.network].small else FROZEN)
        if self.image_size is not None and self.image_size < 32:
            raise AnybatchError(f"image_size is {self.image_size}: give at least 32")
        if self.norm_of("backbone") == FROZEN and self.weights == "none":
            raise AnybatchError(
                "frozen norms of an untrained backbone would normalise nothing: give weights, or backbone 'method'"
            )
        if self.norm_of("backbone") == NONE:
            raise AnybatchError(
                "backbone 'none': its convolutions are nothing without their norms; say 'frozen', 'method' or a method"
            )
        for part in ("neck", "heads"):
            if self.norm_of(part) == FROZEN:
                raise AnybatchError(f"{part} 'frozen' would normalise nothing: it starts untrained; say 'none'")

    def norm_of(self, part: str) -> str:
        """What normalises a part ("backbone", "neck" or "heads"): a method as typed, "frozen" or "none"."""
        given: str = getattr(self, part)
        if given != METHOD:
            return given
        if self.method == FROZEN:
            return FROZEN if part == "backbone" else NONE
        return self.method

    def compared(self) -> tuple[str, ...]:
        """What is set side by side if no methods are named."""
        return ("bn", self._typed("gn"), FROZEN, BEST_CBN)

    def all_methods(self) -> tuple[str, ...]:
        """Every method of the table, as typed for few channels where the network has few, and "frozen"."""
        return (FROZEN, *map(self._typed, METHODS))

    def _typed(self, name: str) -> str:
        return METHODS[name].trial if NETWORKS[self.network].channels % 32 else name
