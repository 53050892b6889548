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

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from anybatch.errors import AnybatchError
from anybatch.lab.config import TrainConfig
from anybatch.lab.tasks import config_class_of

__all__ = ["Published", "Recipe", "load_recipe", "read_recipe", "shipped"]

TYPED = ("seed", "device")  # belong to a run and its machine


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
    folder = Path(str(resources.files(__package__)))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


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
    file = path if path.suffix == ".toml" or path.exists() else shipped().get(str(path), path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        names = ", ".join(shipped())
        raise AnybatchError(f"there is no recipe {path}: give a .toml file, or one of {names}") from error
    except OSError as error:
        raise AnybatchError(f"recipe {file} cannot be read ({error.strerror}): allow reading it") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise AnybatchError(f"recipe {file} is no TOML ({error}): mend it there") from error
    table = _Table(file, content)
    task = table.take("task", str)
    try:
        config_class = config_class_of(task)
    except AnybatchError as error:
        raise table.error("task", str(error)) from error
    data = _Table(file, table.take("data", dict, {}), "data.")
    recipe = Recipe(
        path=file,
        task=task,
        values=_values(_Table(file, table.take("run", dict), "run."), config_class),
        processes=table.count("processes") or 1,
        images=data.count("images"),
        classes=data.count("classes"),
        published=tuple(
            _published(_Table(file, row, f"published[{place}]."))
            for place, row in enumerate(table.take("published", list, []), 1)
        ),
    )
    for each in (table, data):
        each.refuse_rest()
    return recipe


class _Table:
    """A table of the file, from which what is known is taken."""

    def __init__(self, file: Path, content: Any, prefix: str = "") -> None:
        self.file, self.prefix, self.content = file, prefix, content
        if not isinstance(content, dict):
            raise AnybatchError(f"recipe {file}: {prefix.rstrip('.')} is {content!r}: make it a table")
        self.content = dict(content)

    def error(self, key: str, what: str) -> AnybatchError:
        return AnybatchError(f"recipe {self.file}: {self.prefix}{key}: {what}")

    def take(self, key: str, hint: Any, default: Any = None) -> Any:
        if key not in self.content:
            if default is None:
                raise self.error(key, "is missing: add it")
            return default
        value = self.content.pop(key)
        if not _fits(value, hint):
            raise self.error(key, f"is {value!r}: give {_called(hint)}")
        return value

    def count(self, key: str) -> int | None:
        if key not in self.content:
            return None
        value: int = self.take(key, int)
        if value < 1:
            raise self.error(key, f"is {value}: give at least 1")
        return value

    def refuse_rest(self) -> None:
        if self.content:
            raise self.error(next(iter(self.content)), "there is no such key: correct or remove it")


def _values(run: _Table, config_class: type[TrainConfig]) -> dict[str, Any]:
    hints, values = get_type_hints(config_class), dict[str, Any]()
    names = [each.name for each in fields(config_class)]
    for key in list(run.content):
        if key in TYPED:
            raise run.error(key, f"it belongs to a run, not to a recipe: give --{key} with the command")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            mend = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(set(names) - set(TYPED)))}"
            raise run.error(key, f"'{config_class.task}' has no such option: {mend}")
        value = run.take(key, hints[key])
        whole_for_float = float in (hints[key], *get_args(hints[key])) and isinstance(value, int)
        values[key] = float(value) if whole_for_float else value
    try:
        config_class(**values)
    except AnybatchError as error:
        raise AnybatchError(f"recipe {run.file}: {error}") from error
    return values


def _published(row: _Table) -> Published:
    norm, source, options = row.take("norm", str), row.take("source", str), row.take("options", str, "")
    return Published(norm, options, source, {name: float(row.take(name, float)) for name in list(row.content)})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML's can stand where the type is hinted."""
    if get_origin(hint) in _UNIONS:
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _called(hint: Any) -> str:
    """What the type is called in an error."""
    if get_origin(hint) in _UNIONS:
        return " or ".join(_called(each) for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each of it {_called(get_args(hint)[0])}"
    return _NAMES[hint]


_UNIONS = (UnionType, Union)  # of a Literal and None it is typing's

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    bool: "true or false",
    dict: "a table",
    list: "tables in [[ ]]",
}
