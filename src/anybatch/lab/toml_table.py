"""TOML files read strictly: what is unknown, missing or of another type is an error that names file and key."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from anybatch.errors import AnybatchError, did_you_mean
from anybatch.lab.config import TrainConfig

__all__ = ["Table", "field_value", "fields_of", "read_table", "shipped_in"]


def shipped_in(package: str) -> dict[str, Path]:
    """The TOML files in a package, by name."""
    folder = Path(str(resources.files(package)))
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def read_table(kind: str, asked: Path, known: Mapping[str, Path]) -> "Table":
    """What a file says.

    Args:
        kind: what such a file is called: "recipe".
        asked: for a file, or a name.
        known: those in the package, by name.

    Raises:
        AnybatchError: there is none, or it cannot be read, or it is no TOML.
    """
    file = asked if asked.suffix == ".toml" or asked.exists() else known.get(str(asked), asked)
    try:
        return Table(kind, file, tomllib.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, IsADirectoryError) as error:
        mend = did_you_mean(str(asked), known, f"give a .toml file, or one of {', '.join(known)}")
        raise AnybatchError(f"there is no {kind} {asked}: {mend}") from error
    except OSError as error:
        raise AnybatchError(f"{kind} {file} cannot be read ({error.strerror}): allow reading it") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise AnybatchError(f"{kind} {file} is no TOML ({error}): mend it there") from error


class Table:
    """A table of a file, from which what is known is taken.

    Args:
        kind: what such a file is called.
        file: that it is in.
        content: of the table.
        prefix: of its keys, as errors name them: "run.".

    Raises:
        AnybatchError: the content is no table.
    """

    def __init__(self, kind: str, file: Path, content: Any, prefix: str = "") -> None:
        self.kind, self.file, self.prefix = kind, file, prefix
        if not isinstance(content, dict):
            raise AnybatchError(f"{kind} {file}: {prefix.rstrip('.')} is {content!r}: make it a table")
        self.content, self._asked = dict(content), set[str]()

    def error(self, key: str, what: str) -> AnybatchError:
        """The error that names file and key."""
        return AnybatchError(f"{self.kind} {self.file}: {self.prefix}{key}: {what}")

    def missing(self, key: str) -> AnybatchError:
        """The error of a key that is not there, with what may have been meant for it."""
        close = difflib.get_close_matches(key, self.content, 1, 0.7)
        return self.error(
            key, f"is missing: '{close[0]}' is no such key, correct it" if close else "is missing: add it"
        )

    def take(self, key: str, hint: Any, default: Any = None) -> Any:
        """The value of a key, of the type that is hinted.

        Raises:
            AnybatchError: it is missing and has no default, or is of another type.
        """
        self._asked.add(key)
        if key not in self.content:
            if default is None:
                raise self.missing(key)
            return default
        value = self.content.pop(key)
        if not _fits(value, hint):
            raise self.error(key, f"is {value!r}: give {_called(hint)}")
        return value

    def inner(self, key: str, default: Any = None) -> "Table":
        """The table of a key.

        Raises:
            AnybatchError: it is missing and has no default, or is no table.
        """
        return Table(self.kind, self.file, self.take(key, dict, default), f"{self.prefix}{key}.")

    def count(self, key: str) -> int | None:
        """A whole number of at least 1, or None if the key is not there.

        Raises:
            AnybatchError: it is anything else.
        """
        self._asked.add(key)
        if key not in self.content:
            return None
        value: int = self.take(key, int)
        if value < 1:
            raise self.error(key, f"is {value}: give at least 1")
        return value

    def refuse_rest(self) -> None:
        """Raises AnybatchError if there is a key that nobody took."""
        if self.content:
            key = next(iter(self.content))
            mend = did_you_mean(key, self._asked, "correct or remove it")
            raise self.error(key, f"there is no such key: {mend}")


def fields_of(table: Table, config_class: type[TrainConfig], elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Values of fields of a configuration, by name: every key of the table is one.

    Args:
        table: to take them from.
        config_class: of the task.
        elsewhere: fields that are not for this table, with what to do instead.

    Raises:
        AnybatchError: there is no such field, or it is of another type, or the configuration refuses the values.
    """
    values = {key: field_value(table, key, config_class, elsewhere) for key in list(table.content)}
    try:
        config_class(**values)
    except AnybatchError as error:
        raise AnybatchError(f"{table.kind} {table.file}: {error}") from error
    return values


def field_value(
    table: Table, key: str, config_class: type[TrainConfig], elsewhere: Mapping[str, str], several: bool = False
) -> Any:
    """The value of one field as `fields_of` takes it; with `several` a list of such values.

    Raises:
        AnybatchError: there is no such field, or it is of another type.
    """
    if key in elsewhere:
        raise table.error(key, elsewhere[key])
    names = [each.name for each in fields(config_class)]
    if key not in names:
        mend = did_you_mean(key, names, f"there are {', '.join(sorted(set(names) - set(elsewhere)))}")
        raise table.error(key, f"a run of '{config_class.task}' has no such option: {mend}")
    hint: Any = get_type_hints(config_class)[key]
    value = table.take(key, tuple[hint] if several else hint)
    if float not in (hint, *get_args(hint)):
        return value
    return [_as_float(each) for each in value] if several else _as_float(value)


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


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
