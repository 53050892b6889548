"""What a run does when: which images at which step, at which learning rate. All of it follows from the images done."""

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig

__all__ = ["Order", "Schedule"]

CURVE_POINTS = 20  # of the training loss, per epoch


@dataclass(frozen=True)
class Schedule:
    """The run in numbers of examples, all processes together.

    Attributes:
        epoch: examples of an epoch; the last, partial gradient batch is dropped.
        total: examples of the run.
        step: examples of one step of the optimizer.
        micro_batches: of one step and process.
        window: examples that one point of the training loss is the mean of.
        peak_lr: learning rate that the run starts at, or that the warm-up ends at.
        milestones: examples after which the rate is divided by 10; without any it falls along a cosine.
        warmup: examples over which the rate rises to what it is without the warm-up.
        warmup_start: share of the rate that the first of them are trained at.
    """

    epoch: int
    total: int
    step: int
    micro_batches: int
    window: int
    peak_lr: float
    milestones: tuple[int, ...]
    warmup: int
    warmup_start: float

    @classmethod
    def of(cls, config: TrainConfig, examples: int, processes: int) -> "Schedule":
        """The schedule of a configuration.

        Raises:
            AnybatchError: the examples do not fill a gradient batch, or the processes do not divide it.
        """
        updates, gradient_batch = config.updates(examples), config.gradient_batch
        if updates == 0:
            raise AnybatchError(
                f"{examples} training examples do not fill one gradient batch of {gradient_batch}: give more"
            )
        together = config.batch * processes
        if gradient_batch % together:
            raise AnybatchError(
                f"{processes} processes with batch {config.batch} see {together} examples at once, which does not "
                f"divide the gradient batch {gradient_batch}: choose another --batch, or another number of processes"
            )
        step = gradient_batch if config.mode == "accumulate" else together
        epoch = updates * gradient_batch
        return cls(
            epoch=epoch,
            total=config.epochs * epoch,
            step=step,
            micro_batches=step // together,
            window=max(1, updates // CURVE_POINTS) * gradient_batch,
            peak_lr=config.lr * step / config.lr_batch,
            milestones=tuple(milestone * epoch for milestone in config.milestones),
            warmup=config.warmup_steps * step,
            warmup_start=config.warmup_start,
        )

    def lr(self, images: int) -> float:
        """The learning rate of the step that comes after so many images."""
        if self.milestones:
            rate = self.peak_lr / 10.0 ** bisect_right(self.milestones, images)
        else:
            rate = self.peak_lr * 0.5 * (1 + math.cos(math.pi * images / self.total))
        if images < self.warmup:
            rate *= self.warmup_start + (1 - self.warmup_start) * images / self.warmup
        return rate

    def ends_epoch(self, images: int) -> bool:
        """Whether so many images are whole epochs."""
        return images % self.epoch == 0

    def ends_window(self, images: int) -> bool:
        """Whether a point of the training loss is due after so many images."""
        return self.ends_epoch(images) or images % self.epoch % self.window == 0


class Order:
    """The images in the order they are trained on: a permutation an epoch, one after another from the seed.

    Args:
        seed: of the first permutation.
        train_images: that there are.
        epoch: that an epoch takes of them.
    """

    def __init__(self, seed: int, train_images: int, epoch: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._train_images, self._epoch = train_images, epoch
        self._drawn = 0

    def after(self, images: int, count: int) -> Tensor:
        """The indices of the next `count`, of one epoch; `images` never decreases from call to call."""
        epoch, position = divmod(images, self._epoch)
        while self._drawn <= epoch:
            self._permutation = torch.randperm(self._train_images, generator=self._generator)
            self._drawn += 1
        return self._permutation[position : position + count]
