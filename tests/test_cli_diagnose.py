"""`anybatch diagnose` and `anybatch advise` from end to end on small folders of images, and what mistakes look like."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from anybatch.cli import app
from anybatch.diagnose import EXPERIMENTS

from .lab_fakes import image_folder
from .test_cli import run

DIAGNOSE = [
    *["--experiment", "--data", "--image-size", "--network", "--model", "--method", "--checkpoint", "--batch"],
    *["--batches", "--compare", "--lr", "--micro-batches", "--device", "--out"],
]
ADVISE = [
    *["--batch-size", "--micro-batches", "--folds", "--data", "--image-size", "--network", "--model", "--checkpoint"],
    *["--batches", "--lr", "--device"],
]
MODULE = """
import torch
from torch import nn

def net(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )

def grouped(): return net(lambda c: nn.GroupNorm(2, c))
def grey(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
def one_class(): return nn.Sequential(*net()[:5], nn.Linear(4, 1))
def needs(width): return net()
def raises(): raise OSError("no weights")
def nothing(): return None

word = "word"
"""


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a small case, in a working folder that has modules of its own."""
    for name, text in (("nets_of_mine", MODULE), ("no_syntax", "def f(:"), ("divides", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    image_folder(tmp_path / "images", {"red": 30, "green": 30})
    return ["--data", "images", "--image-size", "8"]


def small(images: list[str], *more: str) -> list[str]:
    return ["diagnose", *images, "--batch", "8", "--batches", "2", "--experiment", "depth", *more]


@pytest.mark.parametrize(("command", "options"), [("diagnose", DIAGNOSE), ("advise", ADVISE)])
def test_options_are_frozen(command: str, options: list[str]) -> None:
    """A new option is a promise: it is added here on purpose."""
    parameters = get_command(app).commands[command].params
    assert [parameter.opts[0] for parameter in parameters if parameter.name != "help"] == options


def test_help_lists_the_experiments() -> None:
    code, output = run("diagnose", "--help")
    assert code == 0
    words = output.replace("│", " ").split()
    assert [name for name in EXPERIMENTS if name not in {word.strip(",.:") for word in words}] == []


def test_diagnose_from_end_to_end(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost, each experiment as it starts, what was found, where the page is; the page says what was typed."""
    arguments = small(images, "--experiment", "step-size", "--out", "out")
    monkeypatch.setattr(sys, "argv", ["anybatch", *arguments])
    code, output = run(*arguments)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0].startswith("At most 62 forward and 2 backward passes, about ")
    titles = [EXPERIMENTS[name].title for name in ("depth", "step-size")]
    assert [line.partition(";")[0] for line in lines[1:3]] == titles
    assert lines[3].startswith("ResNet: 43,838 parameters, 9 BatchNorms")
    assert "steps that lower the loss may be" in output
    assert lines[-1] == "Report: out/report.html"
    assert {path.name for path in Path("out").iterdir()} == {"report.html", "diagnosis.json"}
    page, numbers = Path("out/report.html").read_text(), json.loads(Path("out/diagnosis.json").read_text())
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert "anybatch diagnose --data images" in page
    assert list(numbers["results"]) == ["depth", "step-size"]
    assert numbers["model"]["batches"] == 2
    code, _ = run(*small(images, "--no-compare", "--out", "out"))
    assert code == 0
    assert list(json.loads(Path("out/diagnosis.json").read_text())["results"]["depth"]) == ["as given"]


def test_what_nothing_is_found_of_is_said_too(images: list[str]) -> None:
    """The measurement in words, where no rule speaks of it."""
    code, output = run(*small(images))
    assert code == 0
    assert "the variance of what the maps put out changes by a factor of" in output.replace("\n", " ")


def test_a_model_of_the_working_folder(images: list[str]) -> None:
    """It is built the same each time."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        code, output = run(*small(images, "--model", "nets_of_mine:net", "--method", "cbn"))
        assert code == 0, output
        assert "Sequential: 130 parameters, 1 BatchNorms" in output
        found.append(json.loads(Path("results/diagnose/diagnosis.json").read_text()))
    assert found[0]["model"]["kinds of norm"] == "CrossIterationBatchNorm"
    assert found[0]["results"] == found[1]["results"]


def test_a_model_without_batchnorm(images: list[str]) -> None:
    code, output = run(*small(images, "--model", "nets_of_mine:grouped", "--experiment", "batch-noise"))
    assert code == 0, output
    assert "left out batch-noise: the model has no BatchNorm; it has 1 GroupNorm" in output


@pytest.mark.parametrize("method", ["bn", "cbn", "proxynorm-group(groups=4)"])
def test_a_checkpoint(images: list[str], method: str) -> None:
    """Model and data of a training; a method that converts is measured as it was trained."""
    code, output = run("train", *images, "--epochs", "1", "--batch", "8", "--method", method, "--out", "run")
    assert code == 0, output
    options = ["--batch", "8", "--batches", "2", "--experiment", "depth", "--experiment", "evaluation-gap"]
    code, output = run("diagnose", "--checkpoint", "run", *options, "--out", "out")
    assert code == 0, output
    assert "evaluation-gap" in json.loads(Path("out/diagnosis.json").read_text())["results"]


def test_advice(images: list[str]) -> None:
    """At most ten lines, the first of which is what to do."""
    for more in ([], ["--any", "--micro-batches", "4"], ["--model", "nets_of_mine:net"]):
        code, output = run("advise", "--batch-size", "2", "--batches", "1", *images, *more)
        assert code == 0, output
        lines = output.splitlines()
        assert len(lines) <= 10
        assert re.match(r"At batch 2.*: ab\.", lines[0])
        assert any(line.strip().startswith("to do it: ab.convert_(model, ab.") for line in lines)


def test_advice_from_few_images(images: list[str], tmp_path: Path) -> None:
    """As many as there are."""
    image_folder(tmp_path / "few", {"red": 10, "green": 10})
    code, output = run("advise", "--batch-size", "2", "--data", "few", "--image-size", "8")
    assert code == 0, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "dept"], "there is no experiment 'dept'; did you mean depth"),
        (["--method", "cnb"], "unknown method 'cnb'; did you mean cbn"),
        (["--network", "vgg"], "there is no network 'vgg'"),
        (["--data", "no/such/folder"], "there is no data folder no/such/folder"),
        (["--batch", "100"], "batch is 100: 'images' has 48 images"),
        (["--checkpoint", "nowhere"], "nowhere has no checkpoint"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--out", "nets_of_mine.py"], "the diagnosis cannot be written to nets_of_mine.py"),
        (["--model", "nets_of_mine"], "--model nets_of_mine: write it as package.module:function"),
        (["--model", ":net"], "--model :net: write it as package.module:function"),
        (["--model", "nets_of_mine:"], "write it as package.module:function"),
        (["--model", "no_such_module:net"], "No module named 'no_such_module'"),
        (["--model", "nets_of_mine:nets"], "module 'nets_of_mine' has no attribute 'nets'"),
        (["--model", "nets_of_mine:word"], "it is a str; name a function that builds the model"),
        (["--model", "nets_of_mine:nothing"], "it built a NoneType; let it return a module"),
        (["--model", "nets_of_mine:grey"], "expected input[2, 3, 8, 8] to have 1 channels"),
        (["--model", "nets_of_mine:one_class"], "the loss raised IndexError"),
        (["--model", "nets_of_mine:grouped", "--method", "cbn"], "the model has no BatchNorm; it has 1 GroupNorm"),
        (["--model", "nets_of_mine:needs"], "needs() missing 1 required positional argument: 'width'"),
        (["--model", "nets_of_mine:raises"], "OSError: no weights"),
        (["--model", "no_syntax:f"], "SyntaxError: invalid syntax"),
        (["--model", "divides:f"], "ZeroDivisionError: division by zero"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(images: list[str], arguments: list[str], message: str) -> None:
    more = ["--method", "cbn"] if arguments[-1].endswith("grey") else []
    code, output = run(*small(images, *arguments, *more))
    assert code == 2
    last = output.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert not Path("results/diagnose/report.html").exists()


def test_a_folder_is_refused_before_the_measurements(images: list[str]) -> None:
    _, output = run(*small(images, "--out", "nets_of_mine.py"))
    assert output.startswith("Error: the diagnosis cannot be written to nets_of_mine.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "2", "--model", "nets_of_mine:grouped"], "the model has no BatchNorm.*it has GroupNorm"),
        (["--batch-size", "2", "--lr", "1e30"], ""),
        (["--batch-size", "0"], "--batch-size"),
        ([], "Missing option '--batch-size'"),
    ],
)
def test_advice_that_cannot_be_given(images: list[str], arguments: list[str], message: str) -> None:
    """Rates at which training diverges leave CBN out."""
    code, output = run("advise", *images, "--batches", "1", *arguments)
    if not message:
        assert code == 0
        assert "CBN is left out: 8 steps at learning rate 1e+30 diverge" in output
        return
    assert code == 2
    assert re.search(message, output)
