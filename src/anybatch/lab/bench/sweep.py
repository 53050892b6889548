"""The same benchmark over several windows, batches or sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from anybatch.errors import AnybatchError
from anybatch.lab.bench.config import BenchConfig
from anybatch.lab.bench.records import Outcome
from anybatch.lab.bench.timing import bench

__all__ = ["Sweep"]

OVER = {
    "window": "window, batches pooled",
    "batch": "images a step",
    "image-size": "pixels a side",
    "channels": "channels",
}


@dataclass(frozen=True)
class Sweep:
    """A setting and the values it takes.

    Args:
        name: a key of OVER.
        values: each once, ascending.
    """

    name: str
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """From what one types: ``window=2,8,32``.

        Raises:
            AnybatchError: no such setting, or not at least two whole numbers.
        """
        name, _, rest = text.replace(" ", "").partition("=")
        if name not in OVER:
            raise AnybatchError(f"cannot sweep over {name!r}: choose {', '.join(OVER)}, as in window=2,8,32")
        try:
            values = sorted({int(value) for value in rest.split(",")})
        except ValueError:
            values = []
        if len(values) < 2:
            raise AnybatchError(f"{text!r} does not give two or more whole numbers: write it like {name}=2,8,32")
        return cls(name, tuple(values))

    @property
    def axis(self) -> str:
        """What the values are, for people."""
        return OVER[self.name]

    def configs(self, config: BenchConfig) -> list[BenchConfig]:
        """One for every value.

        Raises:
            AnybatchError: a value is out of range, or the setting means nothing here.
        """
        if self.name == "channels" and config.what != "layer":
            raise AnybatchError("channels are those of a layer: give --what layer")
        settings: list[dict[str, Any]] = [{self.name.replace("-", "_"): value} for value in self.values]
        configs = [replace(config, **setting) for setting in settings]
        for each in configs:  # a value that a method refuses is known before anything runs
            for row in each.rows():
                each.norm(row.method)
        return configs

    def run(self, config: BenchConfig, progress: Callable[[int, int], None] | None = None) -> Iterator[Outcome]:
        """The benchmark at each value, as soon as it is done."""
        configs = self.configs(config)
        for place, each in enumerate(configs):

            def show(done: int, total: int, place: int = place) -> None:
                if progress:
                    progress(place * total + done, len(configs) * total)

            yield bench(each, show)
