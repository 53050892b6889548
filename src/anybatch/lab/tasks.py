"""The tasks by name: each is imported when one of its runs is opened."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.task import Task

__all__ = ["config_of", "open_task"]


class _Place(NamedTuple):
    """Where a task's configuration is, and the function from it to the task with its data."""

    config: str
    opener: str


_TASKS = {
    "classify": _Place("anybatch.lab.config:ClassifyConfig", "anybatch.lab.classify:open_classify"),
    "detect": _Place("anybatch.lab.detection.config:DetectConfig", "anybatch.lab.detection.task:open_detect"),
    "segment": _Place("anybatch.lab.segmentation.config:SegmentConfig", "anybatch.lab.segmentation.task:open_segment"),
}


def open_task(config: TrainConfig) -> Task[TrainConfig]:
    """The task of a configuration, with its data.

    Raises:
        AnybatchError: something of it is not there, or does not fit.
    """
    task: Task[TrainConfig] = _imported(_TASKS[config.task].opener)(config)
    return task


def config_of(record: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `TrainConfig.record` wrote; records from before there were tasks are classifiers'.

    Raises:
        AnybatchError: there is no such task, or its configuration refuses the values.
        TypeError: it has no such fields.
    """
    values = dict(record)
    name = values.pop("task", "classify")
    if name not in _TASKS:
        raise AnybatchError(f"there is no task '{name}': there are {', '.join(_TASKS)}")
    config: TrainConfig = _imported(_TASKS[name].config)(**values)
    return config


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
