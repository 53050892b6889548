"""From a study to its runs, and about how long they take."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError, did_you_mean
from anybatch.lab import networks
from anybatch.lab.compare import cost, plan
from anybatch.lab.config import ClassifyConfig, TrainConfig
from anybatch.lab.data import BUILT_IN
from anybatch.lab.display import run_name
from anybatch.lab.studies.reading import Study

__all__ = ["Point", "called", "check_data", "namer", "points", "runs", "seconds", "value_text"]

# Of an image in a run of BatchNorm at a large batch, small-resnet on 28 x 28 pixels, one core: docs/results/f6k.md.
SECONDS_AN_IMAGE = 0.9e-3
IMAGES = {"embedded": 6000, "fashion-mnist": 60000}  # to train on, where a study takes all
NAMES = {"lr": "learning rate", "burn_in_steps": "burn-in", "train_images": "training images"}


@dataclass(frozen=True)
class Point:
    """One combination of what is varied: a comparison with a reference of its own.

    Attributes:
        values: of the varied fields, by name.
        base: of its runs.
    """

    values: Mapping[str, Any]
    base: ClassifyConfig

    def has(self, config: TrainConfig) -> bool:
        """Whether a run belongs to it."""
        return replace(config, method=self.base.method, batch=self.base.batch, seed=self.base.seed) == self.base

    @property
    def text(self) -> str:
        """Its values in words; "" if nothing is varied."""
        return ", ".join(f"{called(name)} {value_text(value)}" for name, value in self.values.items())


def points(study: Study, device: str = "cpu") -> list[Point]:
    """Every combination of what a study varies, in its order."""
    base = replace(study.base, device=device, at_once=True)
    combined = [dict(zip(study.vary, values, strict=True)) for values in product(*study.vary.values())]
    return [Point(values, replace(base, **values)) for values in combined]


def runs(study: Study, seeds: int | None = None, device: str = "cpu") -> list[TrainConfig]:
    """The runs of a study, each once, as `anybatch compare` would plan them point by point.

    Args:
        study: of which.
        seeds: of each run; None as the study says.
        device: that they run on.
    """
    counted = seeds or study.seeds
    return [run for each in points(study, device) for run in plan(each.base, study.methods, study.batches, counted)]


def called(name: str) -> str:
    """A field or an option in words."""
    return NAMES.get(name, name.replace("_", " "))


def value_text(value: Any) -> str:
    """A value of a field or an option: 0.1, step, 1/3."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def namer(varied: Collection[str]) -> Callable[[TrainConfig], str]:
    """What a run is called: its method, batch and seed, and the fields that are varied."""

    def name(config: TrainConfig) -> str:
        values = [f"{called(field)} {value_text(getattr(config, field))}" for field in varied]
        return ", ".join([run_name(config), *values])

    return name


def check_data(study: Study) -> None:
    """Raises AnybatchError, with how to get them, if the study's data are a folder that is not there."""
    data = study.base.data
    if data not in BUILT_IN and not Path(data).expanduser().is_dir():
        mend = did_you_mean(data, BUILT_IN, f"make it, or change 'data' in {study.path}")
        mend = f"get it with: {study.get}" if study.get else mend
        raise AnybatchError(f"study {study.name}: there is no data folder '{data}' here: {mend}")


def seconds(study: Study, seeds: int | None = None) -> float | None:
    """About how long the runs take, one after another on one core; None if the number of images is not known."""
    images = study.base.train_images or IMAGES.get(study.base.data)
    if images is None:
        return None
    size, channels = (28, 1) if study.base.data in BUILT_IN else (study.base.image_size, 3)
    small = _work("small-resnet", 28, 1)
    total = sum(cost(run) * _work(run.network, size, channels) / small for run in runs(study, seeds))  # type: ignore[attr-defined]
    return SECONDS_AN_IMAGE * images * total


@cache
def _work(network: str, size: int, channels: int) -> int:
    """Products that the convolutions make of one image."""
    model, products = networks.build(network, 10, channels).eval(), 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal products
        if isinstance(module, nn.Conv2d):
            products += output.numel() * module.weight[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    return products
