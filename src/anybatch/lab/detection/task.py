"""Detection: images with boxes, a detector of torchvision's, COCO's measures."""

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from anybatch.convert import Report, convert_
from anybatch.errors import AnybatchError
from anybatch.lab.ahead import Ahead
from anybatch.lab.detection import scoring
from anybatch.lab.detection.annotations import Annotations
from anybatch.lab.detection.coco import find, load_image, read
from anybatch.lab.detection.config import FROZEN, NONE, DetectConfig
from anybatch.lab.detection.detectors import LONGEST, PARTS, build_detector
from anybatch.lab.detection.networks import NETWORKS
from anybatch.lab.detection.pictures import draw
from anybatch.lab.detection.scenes import SceneConfig, scene_folder, write_scenes
from anybatch.lab.detection.weights import State, body_weights, freeze_norms_
from anybatch.lab.task import Scores, Split, Task

__all__ = ["Detect", "open_detect"]

EVALUATION_BATCH = 8

Target = dict[str, Tensor]


class Detect(Task[DetectConfig]):
    """A detector on COCO-format data.

    Args:
        config: of the run.
        train: to learn from; images without objects are left out.
        test: to measure on.
        weights: of the backbone, and their digits.
    """

    def __init__(self, config: DetectConfig, train: Annotations, test: Annotations, weights: tuple[State, str]) -> None:
        self.config, self.train, self.test, self.weights = config, train, test, weights
        if config.detector == "mask-rcnn" and not (train.has_masks and test.has_masks):
            lacking = (test if train.has_masks else train).path
            raise AnybatchError(
                f"mask-rcnn needs a segmentation of every object, {lacking} has not: add them, or take faster-rcnn"
            )
        if train.category_ids != test.category_ids:
            raise AnybatchError(
                f"the categories of {train.path} and {test.path} differ: give both the same ids and names"
            )
        if not any(bool((~objects.crowd).any()) for objects in test.instances):
            raise AnybatchError(f"{test.path} has crowds alone, which are not measured: give it single objects")
        self._ahead = Ahead(self._example)
        self.notes = tuple(_dropped(data) for data in (train, test) if data.dropped)
        self.places = [place for place, objects in enumerate(train.instances) if bool((~objects.crowd).any())]
        self.train_count = len(self.places)
        facts = f"{train.fingerprint} {test.fingerprint} {weights[1]}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:12]
        self.size = config.image_size or (min(train.images[0].height, train.images[0].width) if _made(config) else 800)

    def other(self, config: DetectConfig) -> "Detect":
        """The same images and weights."""
        return Detect(config, self.train, self.test, self.weights)

    def norm(self) -> str:
        """What normalises each part."""
        return ", ".join(f"{part}: {self._resolved(part)!r}" for part in PARTS)

    def _resolved(self, part: str) -> Any:
        method = self.config.norm_of(part)
        return method if method in (FROZEN, NONE) else self.config.parse(method, self.train_count)

    def build(self) -> nn.Module:
        """The detector with its norms."""
        config, network = self.config, NETWORKS[self.config.network]
        torch.manual_seed(config.seed)
        body = network.build()
        if self.weights[0]:
            _load(body, self.weights[0], config)
            for name, parameter in body.named_parameters():
                parameter.requires_grad_(not name.startswith(network.fixed) if network.fixed else True)
        if config.norm_of("backbone") == FROZEN:
            freeze_norms_(body)
        neck, heads = (config.norm_of(part) != NONE for part in ("neck", "heads"))
        model = build_detector(config.detector, network, body, len(self.train.categories) + 1, neck, heads, self.size)
        groups: dict[str, list[str]] = {}
        for part, patterns in PARTS.items():
            if config.norm_of(part) not in (FROZEN, NONE):
                groups.setdefault(config.norm_of(part), []).extend(patterns)
        # With boxes, as in training: of many classes an untrained detector finds none, and no mask head would run.
        example = tree_map_only(Tensor, Tensor.cpu, self.generated(2))
        reports = [
            convert_(model, config.parse(method, self.train_count), example_inputs=example, where=patterns)
            for method, patterns in groups.items()
        ]
        self.conversion = "\n".join(map(_listed, reports))
        torch.manual_seed(config.seed)  # what a part drew for its start is no matter of what training draws
        return model.to(config.device).train()

    def batch(self, indices: Tensor, seen: int) -> tuple[list[Tensor], list[Target]]:
        """Images and what is in them, half of them mirrored."""
        examples, device = self._ahead.take(indices, seen), self.config.device
        images = [image.to(device) for image, _ in examples]
        return images, [{name: value.to(device) for name, value in target.items()} for _, target in examples]

    def expect(self, indices: Tensor, seen: int) -> None:
        """Has threads read the images of a step to come."""
        self._ahead.expect(indices, seen)

    def _example(self, index: int, seen: int) -> tuple[Tensor, Target]:
        place = self.places[index]
        entry, objects = self.train.images[place], self.train.instances[place]
        image, kept = load_image(entry), ~objects.crowd
        target = {"boxes": objects.boxes[kept], "labels": objects.labels[kept]}
        if self.config.detector == "mask-rcnn":
            target["masks"] = objects.masks(entry.height, entry.width)[kept]
        if self.config.flip and random.Random(f"{self.config.seed} {seen} {index}").random() < 0.5:
            image, target = _mirrored(image, target)
        return image, target

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[Target]]) -> Tensor:
        """The sum of the detector's losses."""
        losses: dict[str, Tensor] = model(*batch)
        return torch.stack(list(losses.values())).sum()

    def evaluate(self, model: nn.Module, split: Split) -> Scores:
        """COCO's measures on the test images; on the training images none are taken."""
        if split == "train":
            return Scores(None)
        found: list[scoring.Detection] = []
        for start in range(0, len(self.test.images), EVALUATION_BATCH):
            entries = self.test.images[start : start + EVALUATION_BATCH]
            outputs = self.detect(model, [load_image(entry) for entry in entries])
            for entry, output in zip(entries, outputs, strict=True):
                found += scoring.detection(entry.id, output, self.test.category_ids)
        measures = scoring.score(self.test, found, masks=self.config.detector == "mask-rcnn")
        return Scores(measures.pop("AP50"), more=measures)

    @torch.no_grad()
    def detect(self, model: nn.Module, images: Sequence[Tensor]) -> list[Target]:
        """What the model finds, in evaluation mode."""
        found: list[Target] = model.eval()([image.to(self.config.device) for image in images])
        return found

    def generated(self, count: int) -> tuple[list[Tensor], list[Target]]:
        """Noise of the largest size that images are scaled to, a box in each quarter."""
        device, size = self.config.device, self.size
        width = size if _made(self.config) else round(size * LONGEST)
        images = [torch.rand(3, size, width, device=device) for _ in range(count)]
        corners = torch.tensor([[0.05, 0.1], [0.55, 0.1], [0.05, 0.6], [0.55, 0.6]])
        targets = []
        for _ in range(count):
            boxes = torch.cat([corners, corners + 0.15 + 0.2 * torch.rand(4, 2)], dim=1)
            target = {
                "boxes": (boxes * torch.tensor([width, size] * 2)).to(device),
                "labels": torch.randint(1, len(self.train.categories) + 1, (4,), device=device),
            }
            if self.config.detector == "mask-rcnn":
                target["masks"] = (torch.rand(4, *images[0].shape[1:], device=device) < 0.5).byte()
            targets.append(target)
        return images, targets

    def example(self) -> tuple[list[Tensor]]:
        """The first test image, in the list that a detector takes."""
        return ([load_image(self.test.images[0])],)

    def show(self, model: nn.Module, folder: Path) -> dict[str, str]:
        """Test images with what is found in them."""
        images = [load_image(entry) for entry in self.test.images[:8]]
        return draw(images, self.test, self.detect(model, images), folder)


def open_detect(config: DetectConfig, weights: tuple[State, str] | None = None) -> Detect:
    """The task with its data.

    Args:
        config: of the run.
        weights: of the backbone, and their digits, instead of those that the configuration names.

    Raises:
        AnybatchError: there is no such data, something of it is unusable, or the weights do not fit.
    """
    train, test = _data(config.data, config.scenes, config.drop_invalid)
    return Detect(config, train, test, weights or body_weights(config.weights, config.network))


@lru_cache(maxsize=1)  # for the next run of a worker
def _data(data: str, scenes: int, drop_invalid: bool) -> tuple[Annotations, Annotations]:
    if data == "scenes":
        made = SceneConfig(train=scenes, val=max(scenes // 3, 1))
        folder = write_scenes(scene_folder(made), made)
    else:
        folder = Path(data).expanduser()
    (train_file, train_images), (test_file, test_images) = find(folder)
    return read(train_file, train_images, drop_invalid), read(test_file, test_images, drop_invalid)


def _dropped(data: Annotations) -> str:
    counts = ", ".join(f"{count} x {reason}" for reason, count in data.dropped.items())
    return f"{data.path}: dropped {sum(data.dropped.values())} entries: {counts}"


def _made(config: DetectConfig) -> bool:
    return config.data == "scenes"


def _listed(report: Report) -> str:
    """Without the norms that belong to another part."""
    return str(Report(tuple(row for row in report.rows if row.reason != "excluded by where")))


def _load(body: nn.Module, state: State, config: DetectConfig) -> None:
    try:
        body.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()[:300]
        raise AnybatchError(
            f"weights '{config.weights}' do not fit {config.network}: {reason}: give its own, or none"
        ) from error


def _mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    width = image.shape[2]
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    mirrored = {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image.flip(2), mirrored
