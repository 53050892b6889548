"""Classification: images with labels, cross-entropy, accuracy."""

import math
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.lab import networks
from anybatch.lab.augment import augmented
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.data import Dataset, load
from anybatch.lab.task import Scores, Split, Task
from anybatch.layers.config import NormConfig

__all__ = ["EVALUATION_BATCH", "Classify", "open_classify"]

EVALUATION_BATCH = 500


class Classify(Task[ClassifyConfig]):
    """A network of the lab on a data set in memory."""

    def __init__(self, config: ClassifyConfig, dataset: Dataset) -> None:
        networks.check_network(config.network)
        self.config, self.dataset = config, dataset
        self.fingerprint, self.train_count = dataset.fingerprint, len(dataset.train_images)

    def other(self, config: ClassifyConfig) -> "Classify":
        """The same images."""
        return Classify(config, self.dataset)

    def norm(self) -> str:
        """What the method resolves to."""
        return repr(self.config.norm(self.train_count))

    @cached_property
    def _whole(self) -> NormConfig | None:
        return self.config.whole(self.config.norm(self.train_count))

    def build(self) -> nn.Module:
        """The network with its method."""
        torch.manual_seed(self.config.seed)
        model = networks.build(self.config.network, len(self.dataset.classes), self.dataset.train_images.shape[1])
        example = self.dataset.normalise(self.dataset.train_images[:2])
        norm = self._whole or self.config.norm(self.train_count)
        self.conversion = str(convert_(model, norm, example_inputs=(example,)))
        return model.to(self.config.device).train()

    def batch(self, indices: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Normalised images and their labels."""
        images = self.dataset.train_images[indices].to(self.config.device)
        if self.config.augment:
            epoch = seen // (self.config.updates(self.train_count) * self.config.gradient_batch)
            images = augmented(images, indices, self.config.seed, epoch, self.train_count)
        return self.dataset.normalise(images), self.dataset.train_labels[indices].to(self.config.device)

    def batches(self, indices: Tensor, count: int, seen: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, normalised together; one of all of them where they go at once."""
        images, labels = self.batch(indices, seen)
        count = 1 if self._whole else count
        return list(zip(images.chunk(count), labels.chunk(count), strict=True))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> Scores:
        """Accuracy and mean loss."""
        data = self.dataset
        images, labels = (
            (data.train_images, data.train_labels) if split == "train" else (data.test_images, data.test_labels)
        )
        model.eval()
        correct, loss = 0.0, 0.0
        for start in range(0, len(labels), EVALUATION_BATCH):
            y = labels[start : start + EVALUATION_BATCH].to(self.config.device)
            logits = model(data.normalise(images[start : start + EVALUATION_BATCH].to(self.config.device)))
            correct += float((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        mean_loss = loss / len(labels)
        return Scores(round(100 * correct / len(labels), 4), round(mean_loss, 5) if math.isfinite(mean_loss) else None)

    def generated(self, count: int) -> tuple[Tensor, Tensor]:
        """Images of noise with labels at random."""
        images = torch.randn(count, *self.dataset.train_images.shape[1:], device=self.config.device)
        return images, torch.randint(len(self.dataset.classes), (count,), device=self.config.device)

    def example(self) -> Tensor:
        """The first test image, normalised. Shape: (1, C, H, W)."""
        return self.dataset.normalise(self.dataset.test_images[:1])


def open_classify(config: ClassifyConfig) -> Classify:
    """The task with its data.

    Raises:
        AnybatchError: there is no such network or data, or they do not fit.
    """
    networks.check_network(config.network)
    return Classify(config, _load(config.data, config.train_images, config.test_images, config.image_size))


@lru_cache(maxsize=1)  # for the next run of a worker
def _load(data: str, train_images: int | None, test_images: int | None, image_size: int) -> Dataset:
    return load(data, train_images, test_images, image_size)
