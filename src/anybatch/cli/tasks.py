"""From the options of detect and segment to runs: one, or a comparison."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from anybatch.errors import AnybatchError

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """What was asked for besides the configuration itself; None where nothing was said.

    Attributes:
        methods: to compare, or the one to train with; likewise `batches`.
        recipe: a file of option values; what is typed goes before it.
    """

    out: Path | None
    methods: list[str] | None
    batches: list[int] | None
    compare: bool
    seed: int
    seeds: int | None
    resume: bool
    save_every: int | None
    recipe: Path | None
    dry_run: bool
    jobs: int | None

    def run(self, config_class: type[Any], options: Mapping[str, Any]) -> None:
        """Does it, and exits with its code.

        Args:
            config_class: of the task.
            options: values of its fields by name, None where nothing was said.

        Raises:
            AnybatchError: options that do not go together, or whatever the run meets.
        """
        from anybatch.lab import terminal
        from anybatch.lab.compare import plan

        given = {name: value for name, value in options.items() if value is not None}
        if self.recipe is not None:
            from anybatch.lab.recipes import load_recipe

            given = load_recipe(self.recipe, config_class) | given
        console, task = Console(highlight=False), config_class.task
        if self.compare:
            self._refuse({"--resume": self.resume, "--save-every": self.save_every, "--dry-run": self.dry_run})
            if self.seed:
                raise AnybatchError(
                    f"--seed {self.seed} for several runs: theirs are 0, 1, ...; give their number, --seeds"
                )
            base = config_class(**given)
            methods, batches = self.methods or list(base.compared()), self.batches or [1, 2, 4]
            configs = plan(base, methods, batches, self.seeds or 1)
            command = shlex.join(["anybatch", *sys.argv[1:]])
            out = self.out or Path(f"results/{task}-compare")
            raise typer.Exit(terminal.compare(configs, out, self.jobs, command, console))
        several = {"--method": len(self.methods or ()) > 1, "--batch": len(self.batches or ()) > 1}
        self._refuse(several | {"--seeds": self.seeds, "--jobs": self.jobs}, "compare")
        for name, values in (("method", self.methods), ("batch", self.batches)):
            if values:
                given[name] = values[0]
        config = config_class(**{"seed": self.seed, **given})
        if self.dry_run:
            from anybatch.lab.dry_run import dry_run

            raise typer.Exit(dry_run(config, console, self.recipe))
        out = self.out or Path(f"results/{task}")
        raise typer.Exit(terminal.train(config, out, self.resume, self.save_every, sys.argv[1:], console, watched=True))

    def _refuse(self, given: Mapping[str, Any], needs: str = "") -> None:
        wrong = [name for name, value in given.items() if value]
        if wrong and needs:
            raise AnybatchError(f"{' and '.join(wrong)} for one run: give one value, or --{needs} for several runs")
        if wrong:
            raise AnybatchError(f"--compare goes on by itself where it stopped and takes no {' or '.join(wrong)}")
