"""Classification from files: a network of torchvision's, cross-entropy, top-1 and top-5 accuracy."""

import difflib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.integrations._hosts import require
from anybatch.lab.ahead import Ahead
from anybatch.lab.images import IMAGENET_MEAN, IMAGENET_STD
from anybatch.lab.streaming.config import StreamConfig
from anybatch.lab.streaming.listing import Listing, Split, list_folder
from anybatch.lab.streaming.pixels import middle_pixels, training_pixels
from anybatch.lab.task import Scores, Task
from anybatch.lab.task import Split as SplitName

__all__ = ["Stream", "dry_stream", "open_stream"]

EVALUATION_BATCH = 100
_SINGLE = {"aux_logits": False, "init_weights": True}
_MORE = {"googlenet": _SINGLE, "inception_v3": _SINGLE}  # one output, and no warning about how they start

Batch = tuple[Tensor, Tensor]


class Stream(Task[StreamConfig]):
    """A network of torchvision's on listed images, which are decoded in threads, a step ahead."""

    def __init__(self, config: StreamConfig, listing: Listing) -> None:
        _check_network(config.network)
        self.config, self.listing = config, listing
        self.fingerprint, self.train_count = listing.fingerprint, len(listing.train)
        if listing.others:
            self.notes = (f"{config.data}: {listing.others} files in class folders are no images, by their names",)
        self._ahead = Ahead(self._part)

    def other(self, config: StreamConfig) -> "Stream":
        """The same images."""
        return Stream(config, self.listing)

    def norm(self) -> str:
        """What the method resolves to."""
        return repr(self.config.norm(self.train_count))

    def build(self) -> nn.Module:
        """The network with its method."""
        config = self.config
        torch.manual_seed(config.seed)
        models = require("torchvision.models", "torchvision")
        more = _MORE.get(config.network, {})
        model: nn.Module = models.get_model(config.network, weights=None, num_classes=len(self.listing.classes), **more)
        noise = torch.randn(2, 3, config.image_size, config.image_size)
        self.conversion = str(convert_(model, config.norm(self.train_count), example_inputs=(noise,)))
        torch.manual_seed(config.seed)  # what conversion drew is no matter of what training draws
        return model.to(config.device).train()

    def batch(self, indices: Tensor, seen: int) -> Batch:
        """Random parts of the images, normalised, and their labels."""
        labels = [self.listing.train.labels[i] for i in indices.tolist()]
        return self._on_device(self._ahead.take(indices, seen), labels)

    def batches(self, indices: Tensor, count: int, seen: int) -> list[Batch]:
        """The micro-batches of a step, decoded together."""
        images, labels = self.batch(indices, seen)
        return list(zip(images.chunk(count), labels.chunk(count), strict=True))

    def expect(self, indices: Tensor, seen: int) -> None:
        """Starts decoding."""
        self._ahead.expect(indices, seen)

    def _part(self, index: int, seen: int) -> Tensor:
        """Drawn for this step of this run: a resumed run sees the same."""
        random = Random(f"{self.config.seed} {seen} {index}")
        return training_pixels(self.listing.train.path(index), self.config.image_size, random)

    def _on_device(self, images: list[Tensor], labels: list[int]) -> Batch:
        device = self.config.device
        return _normalised(torch.stack(images).to(device)), torch.tensor(labels, device=device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: SplitName) -> Scores:
        """Top-1, top-5 where there are more than five classes, and mean loss; on the training images none is taken."""
        if split == "train":
            return Scores(None)
        model.eval()
        val, first, fifth, loss = self.listing.val, 0, 0, 0.0
        starts = range(0, len(val), EVALUATION_BATCH)
        for start, images in zip(starts, self._middles(starts), strict=True):
            x, labels = self._on_device(images, list(val.labels[start : start + EVALUATION_BATCH]))
            logits = model(x).float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            first, fifth = first + int(best[:, 0].sum()), fifth + int(best.sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        share, mean_loss = 100 / len(val), loss / len(val)
        more = {"top-5 accuracy": round(fifth * share, 4)} if len(self.listing.classes) > 5 else {}
        return Scores(round(first * share, 4), round(mean_loss, 5) if math.isfinite(mean_loss) else None, more)

    def _middles(self, starts: Iterable[int]) -> Iterator[list[Tensor]]:
        """The test images a batch at a time, each decoded while the one before it is looked at."""
        val, size = self.listing.val, self.config.image_size
        coming: list[Future[Tensor]] = []
        for start in starts:
            ready = coming
            places = range(start, min(start + EVALUATION_BATCH, len(val)))
            coming = [self._ahead.pool.submit(middle_pixels, val.path(place), size) for place in places]
            if ready:
                yield [image.result() for image in ready]
        yield [image.result() for image in coming]

    def generated(self, count: int) -> Batch:
        """Noise with labels at random."""
        size, device = self.config.image_size, self.config.device
        images = torch.randn(count, 3, size, size, device=device)
        return images, torch.randint(len(self.listing.classes), (count,), device=device)

    def example(self) -> Tensor:
        """The first test image, normalised. Shape: (1, 3, image_size, image_size)."""
        return _normalised(middle_pixels(self.listing.val.path(0), self.config.image_size).unsqueeze(0))


def open_stream(config: StreamConfig) -> Stream:
    """The task with its data.

    Raises:
        AnybatchError: there is no such network or data, or they do not fit.
    """
    _check_network(config.network)
    return Stream(config, _listed(config.data))


def dry_stream(config: StreamConfig, images: int | None, classes: int | None) -> Stream:
    """As `open_stream`; without the data, if the numbers of training images and classes are given."""
    if Path(config.data).expanduser().is_dir() or images is None or classes is None:
        return open_stream(config)
    names, nothing = tuple(str(place) for place in range(classes)), Split(Path(config.data), (), ())
    task = Stream(config, Listing(names, nothing, nothing, 0, ""))
    task.stand_in(images)
    return task


@lru_cache(maxsize=1)  # for the next run of a worker
def _listed(data: str) -> Listing:
    return list_folder(data)


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255 - mean) / std


def _check_network(name: str) -> None:
    models = require("torchvision.models", "torchvision")
    known: list[str] = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18", "resnet50"]
        raise AnybatchError(
            f"torchvision has no classifier '{name}': choose one that torchvision.models.list_models() names, "
            f"as {' or '.join(near)}"
        )
