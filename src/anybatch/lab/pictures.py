"""Pictures of what trained models do, and how they get onto a page."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from torch import nn

from anybatch.errors import AnybatchError
from anybatch.lab.task import Task
from anybatch.reporting.files import write_atomically

__all__ = ["element", "load", "save"]

_LIST = "pictures.json"
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def save(task: Task[Any], model: nn.Module, folder: Path) -> dict[str, Path]:
    """Makes the task's pictures of a trained model, if it has any. Files by their captions.

    Raises:
        AnybatchError: they cannot be written.
    """
    if type(task).show is Task.show:
        return {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shown = task.show(model, folder)
        write_atomically(folder / _LIST, (json.dumps(shown, indent=1) + "\n").encode())
    except OSError as error:
        raise AnybatchError(f"pictures cannot be written to {folder} ({error.strerror}): make room there") from error
    return {caption: folder / name for caption, name in shown.items()}


def load(folder: Path) -> dict[str, Path]:
    """What `save` made, as far as it is still there."""
    try:
        shown: Mapping[str, str] = json.loads((folder / _LIST).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {caption: folder / name for caption, name in shown.items() if (folder / name).is_file()}


def element(picture: Path, caption: str) -> Markup:
    """The picture in a page, within the page's own file."""
    content = base64.b64encode(picture.read_bytes()).decode()
    source = f"data:{_TYPES[picture.suffix]};base64,{content}"
    return Markup('<figure class="picture"><img alt="{0}" src="{1}"><figcaption>{0}</figcaption></figure>').format(
        escape(caption), source
    )
