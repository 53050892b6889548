"""Recipes: files that say how a published result was trained, as option values, beside what was published.

task = "detect"         # which command: classify and classify-folder are anybatch train's
processes = 4           # that torchrun starts
[data]                  # what a dry run takes where the data are not there
images = 117266
classes = 80
[run]                   # fields of the task's configuration; seed and device are for the command line
batch = 4
[[published]]           # a row each, with its source; every other key is a measure in percent
norm = "CBN"
options = "--method cbn-paper"
source = "..."
"box AP" = 37.6
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.tasks import config_class_of
from anybatch.lab.toml_table import Table, fields_of, read_table, shipped_in

__all__ = ["Published", "Recipe", "load_recipe", "read_recipe", "shipped"]

ELSEWHERE = {
    name: f"it belongs to a run, not to a recipe: give --{name} with the command" for name in ("seed", "device")
}


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        norm: as the source calls it.
        options: of the command, which train it; empty if this library has no such method.
        source: where it was published.
        measures: in percent, by name.
    """

    norm: str
    options: str
    source: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Attributes:
        path: of the file.
        task: that it trains.
        values: of fields of the task's configuration, by name.
        processes: that train together.
        images: training images of the data; None if it does not say. Likewise `classes`.
        published: what to compare with.
    """

    path: Path
    task: str
    values: Mapping[str, Any]
    processes: int
    images: int | None
    classes: int | None
    published: tuple[Published, ...]


def shipped() -> dict[str, Path]:
    """The recipes in the package, by name."""
    return shipped_in(__package__)


def load_recipe(path: Path, config_class: type[TrainConfig]) -> dict[str, Any]:
    """The values of a recipe for this configuration, by field.

    Args:
        path: of the file, or the name of one in the package.
        config_class: of the task that is to be trained.

    Raises:
        AnybatchError: as `read_recipe`; or the recipe is for another task.
    """
    recipe = read_recipe(path)
    if recipe.task != config_class.task:
        raise AnybatchError(
            f"recipe {recipe.path} is for the task '{recipe.task}', not '{config_class.task}': take another recipe, "
            f"or the command for that task"
        )
    return dict(recipe.values)


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: of the file, or the name of one in the package.

    Raises:
        AnybatchError: there is no such recipe, it is no TOML, or something in it is unknown or does not fit.
    """
    table = read_table("recipe", path, shipped())
    task = table.take("task", str)
    try:
        config_class = config_class_of(task)
    except AnybatchError as error:
        raise table.error("task", str(error)) from error
    data = table.inner("data", {})
    recipe = Recipe(
        path=table.file,
        task=task,
        values=fields_of(table.inner("run"), config_class, ELSEWHERE),
        processes=table.count("processes") or 1,
        images=data.count("images"),
        classes=data.count("classes"),
        published=tuple(
            _published(Table("recipe", table.file, row, f"published[{place}]."))
            for place, row in enumerate(table.take("published", list, []), 1)
        ),
    )
    for each in (table, data):
        each.refuse_rest()
    return recipe


def _published(row: Table) -> Published:
    norm, source, options = row.take("norm", str), row.take("source", str), row.take("options", str, "")
    return Published(norm, options, source, {name: float(row.take(name, float)) for name in list(row.content)})
