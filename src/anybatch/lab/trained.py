"""A checkpoint folder as what it was trained on and the model that came of it."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.checkpoint import load_model
from anybatch.lab.classify import Classify
from anybatch.lab.config import TrainConfig
from anybatch.lab.task import Task
from anybatch.lab.tasks import open_task

__all__ = ["open_classifier", "open_trained"]


def open_trained(folder: Path, device: str | None = None) -> tuple[Task[TrainConfig], nn.Module]:
    """The task and its trained model, on its device, in training mode.

    Args:
        folder: of the checkpoint.
        device: to open it on; None is the one that it was trained on.

    Raises:
        AnybatchError: there is no checkpoint, its data are gone or have changed, or the device is not there.
    """
    config, state, fingerprint = load_model(folder)
    config = config if device is None else replace(config, device=device)
    machine.check_device(config.device)
    task = open_task(config)
    if fingerprint != task.fingerprint:
        raise AnybatchError(f"the data of '{config.data}' have changed since {folder} was saved: train anew")
    model = task.build()
    model.load_state_dict(state)
    return task, model


def open_classifier(folder: Path) -> tuple[Classify, nn.Module]:
    """As `open_trained`, of a run of `anybatch train`.

    Raises:
        AnybatchError: as there; or the run was of another task.
    """
    task, model = open_trained(folder)
    if not isinstance(task, Classify):
        raise AnybatchError(
            f"{folder} was trained to {task.config.task}: give an --out of anybatch train, from images in memory"
        )
    return task, model
