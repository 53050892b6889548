"""docs/extend.md adds a method: its edits, made in a copy of the repository, and what includes the method then."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .docs_pages import ROOT, blocks

BLOCKS = [block.code for block in blocks(ROOT / "docs" / "extend.md") if block.language == "python"]
LAYER, IMPORT, ROW, TEST = BLOCKS
NEEDED = ("__init__", "conftest", "test_contract", "tolerances", "torchvision_operators")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its contract tests, with the three edits of the page."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.xz"))
    (root / "tests").mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / "tests" / f"{name}.py", root / "tests")
    shutil.copy(ROOT / "pyproject.toml", root)
    table = root / "src" / "anybatch" / "methods.py"
    text = table.read_text()
    for before, new in ((r"^from \.layers\.nonorm ", IMPORT), (r"^\)\nMETHODS\b", f"{ROW.rstrip()},\n")):
        text, made = re.subn(before, lambda found, new=new: new + found[0], text, flags=re.MULTILINE)
        assert made == 1, before
    table.write_text(text)
    (root / "src" / "anybatch" / "layers" / "l1.py").write_text(LAYER)
    (root / "tests" / "test_l1.py").write_text(TEST)
    return root


def run(copy: Path, *arguments: str) -> str:
    """What Python prints there, of the copy's package and no other."""
    places = {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_its_own_tests_and_the_contract(copy: Path) -> None:
    out = run(copy, "-m", "pytest", "-vv", "-k", "l1", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")
    passed = re.findall(r"^tests/(\w+)\.py::(\w+).* PASSED", out, re.MULTILINE)
    contract = (ROOT / "tests" / "test_contract.py").read_text()
    every = re.findall(r"^@every_method\n(?:[^d].*\n)*?def (\w+)", contract, re.MULTILINE)
    assert {test for file, test in passed if file == "test_contract"} == set(every)
    assert {test for file, test in passed if file == "test_l1"} == set(re.findall(r"^def (\w+)", TEST, re.MULTILINE))
    assert " skipped" not in out


def test_it_converts_trains_and_folds_and_the_command_line_has_it(copy: Path) -> None:
    code = """
import torch, anybatch as ab
from anybatch.cli import app
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
print(ab.__file__)
print(ab.convert_(net, ab.METHODS["l1"].config))
loader = [torch.randn(2, 3, 8, 8) for _ in range(3)]
net(loader[0]).square().mean().backward()
ab.recalibrate_(net, loader)
deploy = ab.fold(net.eval(), example_inputs=loader[0])
torch.testing.assert_close(deploy(loader[0]), net(loader[0]), rtol=1e-4, atol=1e-4)
assert type(deploy[1]) is nn.Identity
app(["methods"])
"""
    out = run(copy, "-c", code)
    assert out.startswith(str(copy / "src" / "anybatch" / "__init__.py"))
    assert "1 norms: 1 converted, 0 left alone" in out
    assert re.search(r"^l1 +the batch's mean and mean absolute deviation.* yes ", out, re.MULTILINE)
