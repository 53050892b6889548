"""A tiny study for the tests of anybatch study, made-up runs of it, and the work without worker processes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.errors import AnybatchError
from anybatch.lab import compare
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.studies import checking
from anybatch.lab.studies.planning import runs
from anybatch.lab.studies.publishing import publish
from anybatch.lab.studies.reading import Study, read_study
from anybatch.lab.tasks import open_task
from anybatch.lab.training import RunResult, train_run
from anybatch.lab.workers import Event, Failed, Finished, Started

from .lab_fakes import result

ROOT = Path(__file__).parents[1]
HEAD = 'title = "Tiny"\nquestion = "Does it run?"\n'
PLAN = 'methods = ["bn", "cbn"]\nbatches = [16, 32]\nseeds = 2\n'
BASE = "[base]\ntrain_images = 64\ntest_images = 100\nepochs = 1\n"
VARY = '[vary]\nlr = [0.05, 0.1]\n[figure]\nx = "lr"\npanels = "batch"\n'
TINY = HEAD + PLAN + BASE


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["study", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return done.exit_code, done.output


def written(folder: Path, text: str = TINY, name: str = "tiny") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def made_up(study: Study, seeds: int | None = None) -> list[RunResult]:
    """Runs that never ran: a better score at a larger batch."""
    return [
        replace(result(accuracy=70 + c.batch / 4 + c.seed / 2), config=c, key=f"{place:016}")
        for place, c in enumerate(runs(study, seeds))
    ]


def here(configs: Sequence[ClassifyConfig], jobs: int, pictures: Path | None = None) -> Iterator[Event]:
    """The work of the workers, without their processes."""
    for config in configs:
        yield Started(config)
        try:
            yield Finished(config, train_run(open_task(config)))
        except AnybatchError as error:
            yield Failed(config, str(error))


def work_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on commands are typed in `folder`, and what they run runs in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(compare, "run_all", here)
    monkeypatch.setattr(checking, "run_all", here)
    return folder


def publish_tiny(folder: Path) -> Path:
    """The tiny study, run and published in `folder`."""
    study = read_study(written(folder))
    publish(folder, study, [train_run(open_task(config)) for config in runs(study)])
    return folder


def is_a_picture(path: Path) -> bool:
    colours = np.asarray(Image.open(path).convert("RGB"), np.int32) @ (65536, 256, 1)
    return len(np.unique(colours)) > 20
