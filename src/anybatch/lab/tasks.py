"""The tasks by name: each is imported when one of its runs is opened."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.task import Task

__all__ = ["config_class_of", "config_of", "open_dry", "open_task"]


class _Place(NamedTuple):
    """Where a task's configuration is, and the functions from it to the task with its data, and to one for a dry run.

    A dry run's takes the numbers of images and of classes too, None if they are not known, for where there are no data.
    """

    config: str
    opener: str
    dry: str = ""


_TASKS = {
    "classify": _Place("anybatch.lab.config:ClassifyConfig", "anybatch.lab.classify:open_classify"),
    "classify-folder": _Place(
        "anybatch.lab.streaming.config:StreamConfig",
        "anybatch.lab.streaming.task:open_stream",
        "anybatch.lab.streaming.task:dry_stream",
    ),
    "detect": _Place(
        "anybatch.lab.detection.config:DetectConfig",
        "anybatch.lab.detection.task:open_detect",
        "anybatch.lab.detection.dry:dry_detect",
    ),
    "segment": _Place("anybatch.lab.segmentation.config:SegmentConfig", "anybatch.lab.segmentation.task:open_segment"),
}


def open_task(config: TrainConfig) -> Task[TrainConfig]:
    """The task of a configuration, with its data.

    Raises:
        AnybatchError: something of it is not there, or does not fit.
    """
    task: Task[TrainConfig] = _imported(_TASKS[config.task].opener)(config)
    return task


def open_dry(config: TrainConfig, images: int | None, classes: int | None) -> Task[TrainConfig]:
    """As `open_task`, for a run that only tries the model; without the data where it can do without them.

    Args:
        config: of the run.
        images: training images that there would be, where there are no data; None if that is not known.
        classes: likewise.

    Raises:
        AnybatchError: it cannot do without what is not there.
    """
    place = _TASKS[config.task]
    if not place.dry:
        return open_task(config)
    task: Task[TrainConfig] = _imported(place.dry)(config, images, classes)
    return task


def config_of(record: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `TrainConfig.record` wrote; records from before there were tasks are classifiers'.

    Raises:
        AnybatchError: there is no such task, or its configuration refuses the values.
        TypeError: it has no such fields.
    """
    values = dict(record)
    config: TrainConfig = config_class_of(values.pop("task", "classify"))(**values)
    return config


def config_class_of(task: str) -> type[TrainConfig]:
    """The configuration of the task of that name.

    Raises:
        AnybatchError: there is none.
    """
    if task not in _TASKS:
        raise AnybatchError(f"there is no task '{task}': there are {', '.join(_TASKS)}")
    found: type[TrainConfig] = _imported(_TASKS[task].config)
    return found


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
