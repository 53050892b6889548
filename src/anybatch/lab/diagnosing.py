"""`anybatch diagnose` and `anybatch advise`: any model, the lab's data, and what a terminal shows of it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from anybatch.convert import convert_
from anybatch.diagnose.advice import advise
from anybatch.diagnose.diagnosis import Diagnosis, Progress, diagnose
from anybatch.diagnose.experiments import choose
from anybatch.diagnose.report import make_folder
from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.classify import Classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.data import Dataset, load
from anybatch.lab.trained import open_classifier
from anybatch.methods import parse_method
from anybatch.reporting.page import duration

__all__ = ["Case", "run_advice", "run_diagnosis"]

_TEST_IMAGES = 512
_COLOURS = {"trouble": "bold red", "well": "green"}


@dataclass(frozen=True)
class Case:
    """A model and its data, as named on the command line.

    Attributes:
        data: as in ClassifyConfig; likewise ``image_size`` and ``network``.
        model: "package.module:function", a function without arguments that builds the model; instead of ``network``.
        method: its BatchNorms are converted to this first.
        checkpoint: folder of `anybatch train`, instead of all of these.
        batch: images of a batch.
        batches: how many.
    """

    data: str = "embedded"
    image_size: int = 64
    network: str = "small-resnet"
    model: str | None = None
    method: str = "bn"
    checkpoint: Path | None = None
    batch: int = 32
    batches: int = 8
    device: str = "cpu"

    def load(self) -> tuple[nn.Module, Dataset]:
        """The model, on its device, and the data.

        Raises:
            AnybatchError: something of it is not there, or does not fit.
        """
        machine.check_device(self.device)
        if self.batch < 1:
            raise AnybatchError(f"batch is {self.batch}: give at least 1")
        if self.device == "cpu":
            torch.set_num_threads(1)  # as in a comparison: the same numbers
        if self.checkpoint is not None:
            task, model = open_classifier(self.checkpoint)
            return model, task.dataset
        dataset = load(self.data, None, None, self.image_size)
        if self.model is None:
            config = ClassifyConfig(self.method, network=self.network, device=self.device)
            return Classify(config, dataset).build(), dataset
        torch.manual_seed(0)  # the same numbers each time
        model = _built(self.model, imported(self.model))
        if not isinstance(model, nn.Module):
            raise AnybatchError(f"--model {self.model}: it built a {type(model).__name__}; let it return a module")
        example = dataset.normalise(dataset.train_images[:2])
        if self.method != "bn":
            convert_(model, parse_method(self.method), example_inputs=(example,))
        return model.to(self.device), dataset

    def loader(self, dataset: Dataset) -> list[tuple[Tensor, Tensor]]:
        """The first batches of the training images.

        Raises:
            AnybatchError: there are fewer images than one batch.
        """
        there = len(dataset.train_images) // self.batch
        if not there:
            raise AnybatchError(f"batch is {self.batch}: '{dataset.name}' has {len(dataset.train_images)} images")
        return list(_batches(dataset, dataset.train_images, dataset.train_labels, self.batch, min(there, self.batches)))

    def test(self, dataset: Dataset) -> list[tuple[Tensor, Tensor]]:
        """Some of the test images, in one batch."""
        count = min(_TEST_IMAGES, len(dataset.test_images))
        return list(_batches(dataset, dataset.test_images, dataset.test_labels, count, 1))


def imported(path: str) -> Callable[[], nn.Module]:
    """The function that "package.module:function" names; modules in the working folder count.

    Raises:
        AnybatchError: there is none.
    """
    name, _, function = path.partition(":")
    if not name or not function:
        raise AnybatchError(f"--model {path}: write it as package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise AnybatchError(
            f"--model {path}: {error}; name a module that can be imported here, and a function in it"
        ) from error
    except Exception as error:
        raise AnybatchError(f"--model {path}: its module raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise AnybatchError(f"--model {path}: it is a {type(found).__name__}; name a function that builds the model")
    build: Callable[[], nn.Module] = found
    return build


def _built(path: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:
        raise AnybatchError(f"--model {path}: it raised {type(error).__name__}: {error}") from error


def run_diagnosis(
    case: Case,
    experiments: list[str] | None,
    compare: bool,
    rate: float,
    micro_batches: int,
    out: Path,
    command: str,
    console: Console,
) -> None:
    """Diagnoses, writes report.html and diagnosis.json, prints what was found.

    Raises:
        AnybatchError: the case cannot be measured, or the files cannot be written.
    """
    choose(experiments)  # before anything takes time
    model, dataset = case.load()
    make_folder(out)  # likewise
    with _shown(console) as progress:
        found = diagnose(
            model,
            case.loader(dataset),
            F.cross_entropy,
            batches=case.batches,
            test=case.test(dataset),
            experiments=experiments,
            compare=compare,
            rate=rate,
            micro_batches=micro_batches,
            progress=progress,
        )
    _print(found, console)
    console.print(f"\nReport: [bold]{escape(str(found.save(out, command)))}[/]", soft_wrap=True)


def run_advice(case: Case, batch_size: int, micro_batches: int, folds: bool, rate: float, console: Console) -> None:
    """Prints which method to train with.

    Raises:
        AnybatchError: the case cannot be measured.
    """
    model, dataset = case.load()
    case = replace(case, batch=max(1, min(case.batch, len(dataset.train_images))))
    advice = advise(
        model,
        case.loader(dataset),
        F.cross_entropy,
        batch_size,
        micro_batches,
        folds,
        batches=case.batches,
        rate=rate,
    )
    first, *rest = str(advice).splitlines()
    console.print(f"[bold]{escape(first)}[/]", soft_wrap=True)
    for line in rest:
        console.print(escape(line), soft_wrap=True)


def _batches(
    dataset: Dataset, images: Tensor, labels: Tensor, size: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, size * count, size):
        yield dataset.normalise(images[start : start + size]), labels[start : start + size]


def _print(found: Diagnosis, console: Console) -> None:
    facts = found.model
    head = f"{facts['class']}: {facts['parameters']:,} parameters, {facts['BatchNorms']} BatchNorms"
    console.print(f"[bold]{escape(head)}[/]", soft_wrap=True)
    for kind, text in found.statements():
        console.print(f"  [{_COLOURS.get(kind, 'dim')}]{kind:<8}[/] {escape(text)}", soft_wrap=True)
    if found.advice is not None:
        console.print(f"\n{escape(str(found.advice))}", soft_wrap=True)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """The cost before it starts, then a bar on a terminal and a line an experiment in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")
        shown = ""

        def show(progress: Progress) -> None:
            nonlocal shown
            if not progress.doing and not shown:
                console.print(
                    f"At most {progress.passes.forward:,} forward and {progress.passes.backward:,} backward passes, "
                    f"about {duration(progress.seconds_left)}"
                )
            elif progress.doing != shown and not console.is_terminal:
                console.print(f"{progress.doing}; about {duration(progress.seconds_left)} left")
            shown = progress.doing
            left = f"about {duration(progress.seconds_left)} left"
            bar.update(task, description=progress.doing, completed=progress.done, total=progress.total, left=left)

        yield show
