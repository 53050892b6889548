"""A study's file, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anybatch.errors import AnybatchError
from anybatch.lab.compare import expand
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.networks import check_network
from anybatch.lab.studies.options import has_option
from anybatch.lab.toml_table import Table, field_value, fields_of, read_table, shipped_in
from anybatch.typed import tidy_method

__all__ = ["Study", "View", "read_study", "shipped"]

ELSEWHERE = {
    "method": "it differs between the runs: give methods = [...], above the tables",
    "batch": "it differs between the runs: give batches = [...], above the tables",
    "seed": "it differs between the runs: give seeds = 5, their number, above the tables",
    "at_once": "it changes no result: leave it out",
    "device": "it belongs to a machine, not to a study: give --device with the command",
}
DATA = ("data", "train_images", "test_images", "image_size")
OF_ONE = {name: "a study is of one data set: give it in [base], and make a study each of several" for name in DATA}


@dataclass(frozen=True)
class View:
    """What a study's figure and tables show.

    Attributes:
        x: along the axis, and a column each: "batch", a varied field, or an option of the methods.
        panels: what has a panel and a table each: "method", "batch" or a varied field; "" is one for all.
        y: "score", or "difference" to the reference.
        floor: where the axis begins; None where the values do.
    """

    x: str = "batch"
    panels: str = ""
    y: Literal["score", "difference"] = "score"
    floor: float | None = None


@dataclass(frozen=True)
class Study:
    """A study's file.

    Attributes:
        name: of the files that it makes.
        path: of the file.
        title: of page and figure.
        question: in one sentence.
        base: what the runs have in common; its method, batch, seed and device do not count.
        methods: as typed.
        batches: examples that a normalization layer sees at once.
        seeds: runs of each.
        vary: values of fields of the base, by name, of which every combination is compared.
        view: what is shown.
        get: how to get the data where they are not there; "" if it does not say.
        note: of the page, after the question; "" for none.
    """

    name: str
    path: Path
    title: str
    question: str
    base: ClassifyConfig
    methods: tuple[str, ...]
    batches: tuple[int, ...]
    seeds: int
    vary: Mapping[str, tuple[Any, ...]]
    view: View
    get: str
    note: str

    @property
    def shipped(self) -> bool:
        """Whether it is one of the package's."""
        return shipped().get(self.name) == self.path


def shipped() -> dict[str, Path]:
    """The studies in the package, by name."""
    return shipped_in(__package__)


def read_study(path: Path) -> Study:
    """Reads and checks a study.

    Args:
        path: of the file, or the name of one in the package.

    Raises:
        AnybatchError: there is no such study, it is no TOML, or something in it is unknown or does not fit.
    """
    table = read_table("study", path, shipped())
    title, question = table.take("title", str), table.take("question", str)
    get, note = table.take("get", str, ""), table.take("note", str, "")
    seeds = table.count("seeds")
    if seeds is None:
        raise table.missing("seeds")
    methods, batches = _methods(table), _several(table, "batches", int)
    base = ClassifyConfig(**fields_of(table.inner("base", {}), ClassifyConfig, ELSEWHERE))
    vary = _varied(table.inner("vary", {}), base)
    view = _view(table.inner("figure", {}))
    table.refuse_rest()
    file = table.file
    study = Study(file.stem, file, title, question, base, methods, batches, seeds, vary, view, get, note)
    _check(table, study)
    return study


def _methods(table: Table) -> tuple[str, ...]:
    try:
        tidy = [tidy_method(typed) for typed in table.take("methods", tuple[str])]
    except AnybatchError as error:
        raise table.error("methods", str(error)) from error
    return _distinct(table, "methods", tidy)


def _several(table: Table, key: str, hint: Any) -> tuple[Any, ...]:
    return _distinct(table, key, table.take(key, tuple[hint, ...]))


def _distinct(table: Table, key: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if not values:
        raise table.error(key, "is empty: give at least one")
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise table.error(key, f"{twice[0]!r} is given twice: remove one")
    return tuple(values)


def _varied(table: Table, base: ClassifyConfig) -> dict[str, tuple[Any, ...]]:
    names = list(table.content)
    vary = {n: field_value(table, n, ClassifyConfig, ELSEWHERE | OF_ONE, several=True) for n in names}
    for name, values in vary.items():
        _distinct(table, name, values)
        for value in values:
            try:
                config = replace(base, **{name: value})
                check_network(config.network)
            except AnybatchError as error:
                raise table.error(name, str(error)) from error
    return {name: tuple(values) for name, values in vary.items()}


def _view(table: Table) -> View:
    default = View()
    floor = table.take("floor", float) if "floor" in table.content else None
    view = View(
        x=table.take("x", str, default.x),
        panels=table.take("panels", str, default.panels),
        y=table.take("y", Literal["score", "difference"], default.y),
        floor=floor,
    )
    table.refuse_rest()
    return view


def _check(table: Table, study: Study) -> None:
    """Raises AnybatchError unless the parts of a study fit together."""
    try:
        check_network(study.base.network)
    except AnybatchError as error:
        raise table.error("base.network", str(error)) from error
    least, few = study.base.gradient_batch, study.base.train_images
    if few is not None and few < least:
        raise table.error("base.train_images", f"is {few}, less than a gradient batch: give at least {least}")
    if study.view.floor is not None and study.view.y == "score" and not 0 <= study.view.floor < 100:
        raise table.error("figure.floor", f"is {study.view.floor:g}: give percent, from 0 to less than 100")
    for batch in study.batches:
        for size in study.vary.get("gradient_batch", (study.base.gradient_batch,)):
            try:
                replace(study.base, batch=batch, gradient_batch=size)
            except AnybatchError as error:
                raise table.error("batches", str(error)) from error
    for method in expand(study.base, study.methods):
        try:
            study.base.parse(method, study.base.gradient_batch)
        except AnybatchError as error:
            raise table.error("methods", str(error)) from error
    view, varied = study.view, list(study.vary)
    if view.panels not in ("", "method", "batch", *varied):
        raise table.error("figure.panels", f"is '{view.panels}': give {_or(['method', 'batch', *varied])}")
    if view.x == view.panels:
        raise table.error("figure.panels", f"is '{view.x}', as figure.x: give another, or leave it out")
    if view.x not in ("batch", *varied) and not any(
        has_option(study.base, method, view.x) for method in expand(study.base, study.methods)
    ):
        known = _or(["batch", *varied])
        raise table.error("figure.x", f"is '{view.x}', which no method has as an option: give {known}, or an option")
    if hidden := [name for name, values in study.vary.items() if len(values) > 1 and name not in (view.x, view.panels)]:
        raise table.error(f"vary.{hidden[0]}", "the figure does not show it: make it figure.x or figure.panels")


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
