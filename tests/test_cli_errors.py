"""What the command line says of an error that nobody foresaw, and what `anybatch env` adds to a report of it."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from typer.testing import CliRunner, Result

import anybatch as ab
from anybatch.cli import app
from anybatch.lab import environment, terminal, workers
from anybatch.lab.bug_report import FRAMES, RULE
from anybatch.lab.config import ClassifyConfig


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, **variables: str) -> Result:
    """`anybatch weigh "a folder"`, whose work raises `error` some calls down."""

    def fail(depth: int) -> None:
        if not depth:
            raise error
        deeper(depth)

    def deeper(depth: int) -> None:  # the same line again and again would be shown once
        fail(depth - 1)

    monkeypatch.setattr(terminal, "weigh", lambda *_: fail(10))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anybatch", "weigh", "a folder"])
    return CliRunner().invoke(app, ["weigh", "a folder"], env={"NO_COLOR": "1", **variables})


def test_what_nobody_foresaw_ends_with_a_block_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_with(KeyError("[red]layer[/]\nand more"), monkeypatch)
    assert result.exit_code == 1
    assert result.stdout == ""
    head, block, rest = result.stderr.split(RULE)
    assert head.startswith("Error: KeyError: '[red]layer[/]\\nand more' (")
    assert "please report it" in head
    assert "anybatch env" in head
    assert rest == "\n"
    lines = block.strip().splitlines()
    assert lines[0] == "$ anybatch weigh 'a folder'"
    assert lines[1].startswith(f"anybatch {ab.__version__}")
    assert f"torch {torch.__version__}, Python {sys.version.split()[0]}, " in lines[1]
    assert sum(line.startswith("  File ") for line in lines) == FRAMES
    assert lines[-1] == "KeyError: '[red]layer[/]\\nand more'"


def test_an_error_without_a_word_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing_with(AssertionError(), monkeypatch).stderr.startswith("Error: AssertionError (")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_memory_that_is_missing_is_no_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_with(error, monkeypatch)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: out of memory: take a smaller --batch")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), ab.AnybatchError("x is 3: give 4")])
def test_every_frame_on_demand(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_with(error, monkeypatch, ANYBATCH_TRACEBACK="1")
    assert result.exception is error
    assert result.output == ""


@pytest.mark.parametrize("off", ["", "0"])
def test_a_foreseen_error_stays_one_line(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_with(ab.AnybatchError("x is 3: give 4"), monkeypatch, ANYBATCH_TRACEBACK=off)
    assert (result.exit_code, result.stderr) == (2, "Error: x is 3: give 4\n")


def test_usage_errors_and_ctrl_c_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["weigh"]).exit_code == 2
    result = failing_with(KeyboardInterrupt(), monkeypatch)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), r"KeyError: 'x' (" + __file__),
        (ab.AnybatchError("x is 3: give 4"), "x is 3: give 4"),
        (MemoryError(), "out of memory: take a smaller --batch"),
    ],
)
def test_a_failed_run_of_a_comparison_says_where(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: ClassifyConfig) -> None:
        raise error

    monkeypatch.setattr(workers, "open_task", fail)
    event = workers._run(ClassifyConfig(), None, None)
    assert isinstance(event, workers.Failed)
    assert event.reason.startswith(said)


def test_env_prints_what_a_report_needs() -> None:
    """In a process of its own: no library is imported to tell its version."""
    code = "import sys; from anybatch.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += "import json; print(json.dumps(sorted({'timm', 'matplotlib', 'transformers'} & set(sys.modules))))"
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, "env"], capture_output=True, text=True, env=variables)
    *lines, loaded = done.stdout.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert done.stderr == ""
    assert json.loads(loaded) == []
    assert found["anybatch"].split()[0] == ab.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == "1 (OMP_NUM_THREADS=1)"
    assert found["devices"].startswith("cpu")
    assert f"typer {environment.version('typer')}" in found["libraries"].split(", ")
    assert "pytest" not in done.stdout


def test_env_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_timm(name: str) -> str:
        if name == "timm":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment, "version", without_timm)
    found = environment.environment()
    assert found["not installed"] == "timm"
    assert "rich 1.0" in found["libraries"]


def test_env_of_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "requires", unknown)
    assert environment.environment()["libraries"] == "none"


def test_env_names_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        get_device_name = staticmethod(lambda i: f"Card {i}")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    assert environment.environment()["devices"] == "cpu, cuda:0 Card 0, cuda:1 Card 1"
    monkeypatch.setattr(torch, "get_device_module", lambda kind: object())
    assert environment.environment()["devices"] == "cpu, cuda:0, cuda:1"
