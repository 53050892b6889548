"""Segmentation as a task: patches with masks, Dice and cross-entropy, mean Dice."""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.integrations._hosts import require
from anybatch.lab.segmentation import scores
from anybatch.lab.segmentation.config import SegmentConfig
from anybatch.lab.segmentation.data import load
from anybatch.lab.segmentation.examples import Example, Examples, Intensity
from anybatch.lab.segmentation.losses import dice_ce
from anybatch.lab.segmentation.networks import NETWORKS
from anybatch.lab.segmentation.patches import cut, generator_for
from anybatch.lab.task import Scores, Split, Task

__all__ = ["Segment", "open_segment"]

WINDOWS = 4  # of an example that are evaluated at once

Batch = tuple[Tensor, Tensor]


class Segment(Task[SegmentConfig]):
    """A network of MONAI's on images or volumes with masks."""

    def __init__(self, config: SegmentConfig, examples: Examples) -> None:
        self.config, self.examples = config, examples
        self.patch = config.patch or examples.patch
        if self.patch % NETWORKS[config.network].multiple:
            raise AnybatchError(
                f"{config.network} needs patches of a multiple of {NETWORKS[config.network].multiple}, '{config.data}' "
                f"has {self.patch}: give a patch"
            )
        self.fingerprint, self.train_count = examples.fingerprint, len(examples.train)

    def other(self, config: SegmentConfig) -> "Segment":
        """The same examples."""
        return Segment(config, self.examples)

    def norm(self) -> str:
        """What the method resolves to."""
        return repr(self.config.norm(self.train_count))

    def build(self) -> nn.Module:
        """The network with its method."""
        config, data = self.config, self.examples
        torch.manual_seed(config.seed)
        model = NETWORKS[config.network].build(data.dims, data.channels, len(data.classes), config.width)
        pair = [cut(data.train[index], self.patch, generator_for(index))[0] for index in (0, -1)]
        self.conversion = str(convert_(model, config.norm(self.train_count), example_inputs=(torch.stack(pair),)))
        torch.manual_seed(config.seed)  # what a method drew for its start is no matter of what training draws
        return model.to(config.device).train()

    def batch(self, indices: Tensor, seen: int) -> Batch:
        """Patches, drawn anew each time, and their masks."""
        pairs = [
            cut(self.examples.train[index], self.patch, generator_for(self.config.seed, seen, index))
            for index in indices.tolist()
        ]
        images, masks = (torch.stack(part) for part in zip(*pairs, strict=True))
        return images.to(self.config.device), masks.to(self.config.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Soft Dice plus cross-entropy."""
        images, masks = batch
        return dice_ce(model(images), masks)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> Scores:
        """Mean Dice over the foreground classes, each the mean over the examples whose mask has it.

        An example without a class says nothing of that class here; what is found of it all the same counts in the IoU,
        of the pixels of all examples together. Of the training examples, the first as many as there are test examples
        are measured.
        """
        data = self.examples
        chosen = data.test if split == "test" else data.train[: len(data.test)]
        counted, losses = [], []
        for each in chosen:
            logits = self.predict(model, each)
            counted.append(scores.counts(logits.argmax(0), each.mask, len(data.classes)))
            losses.append(float(dice_ce(logits.unsqueeze(0), each.mask.long().unsqueeze(0))))
        counts = torch.stack(counted)
        dice, iou = scores.dice(counts).nanmean(0), scores.iou(counts.sum(0))
        loss = sum(losses) / len(losses)
        more = {"mean IoU": iou.nanmean()} | {
            f"Dice of {name}": value for name, value in zip(data.classes[1:], dice, strict=True) if not value.isnan()
        }
        mean = dice.nanmean()  # nan where the training examples that are measured have no class at all
        return Scores(
            None if mean.isnan() else _percent(mean),
            round(loss, 5) if math.isfinite(loss) else None,
            {name: _percent(value) for name, value in more.items()},
        )

    @torch.no_grad()
    def predict(self, model: nn.Module, each: Example) -> Tensor:
        """Logits of a whole example in evaluation mode, from windows of the patch's size that overlap by a quarter.

        Shape: (classes, H, W) or (classes, D, H, W), on the CPU.
        """
        logits: Tensor = require("monai.inferers", "segment").sliding_window_inference(
            each.normalise(each.image).unsqueeze(0),
            (self.patch,) * self.examples.dims,
            WINDOWS,
            model.eval(),
            sw_device=torch.device(self.config.device),
            device=torch.device("cpu"),
        )
        return logits[0]

    def generated(self, count: int) -> Batch:
        """Patches of noise with classes at random."""
        data, device = self.examples, self.config.device
        sides = (self.patch,) * data.dims
        images = torch.randn(count, data.channels, *sides, device=device)
        return images, torch.randint(len(data.classes), (count, *sides), device=device)

    def example(self) -> Tensor:
        """A window of the first test example, as evaluation gives it to the model. Shape: (1, C, side, ...)."""
        return cut(self.examples.test[0], self.patch, generator_for(0))[0].unsqueeze(0)

    def show(self, model: nn.Module, folder: Path) -> dict[str, str]:
        """Test examples, their masks, and what the model makes of them."""
        from anybatch.lab.segmentation.pictures import draw

        shown = self.examples.test[:4]
        found = [self.predict(model, each).argmax(0) for each in shown]
        return draw(shown, found, self.examples.classes, folder)


def _percent(share: Tensor) -> float:
    return round(100 * float(share), 4)


def open_segment(config: SegmentConfig) -> Segment:
    """The task with its data.

    Raises:
        AnybatchError: there is no such data, or something of it is unusable.
    """
    examples = _load(config.data, config.image_size, config.spacing, config.intensity)
    return Segment(config, examples.first(config.train_examples, config.test_examples))


@lru_cache(maxsize=1)  # for the next run of a worker
def _load(data: str, image_size: int | None, spacing: float | None, intensity: Intensity | None) -> Examples:
    return load(data, image_size, spacing, intensity)
