"""The package as a stranger gets it: its wheel in a fresh environment, beside torch alone, then with the command line.

python -m scripts.check_package [folder of the wheel and the sdist] [python of the fresh environment]

`make package` builds both into dist/ and calls this. It takes minutes, most of them to install; the first check that
fails is named, with what was found, and ends it with exit code 1.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What the library must do without. torch brings jinja2 along, and on Linux its CUDA build triton: they may be there.
LAB = ("typer", "rich", "matplotlib", "jinja2", "numpy", "PIL", "safetensors", "triton")
NOT_TORCHS = ("typer", "rich", "matplotlib", "numpy", "pillow", "safetensors", "torchvision", "timm")

LIBRARY = f"""
import sys
import torch
from torch import nn
import anybatch as ab

assert "site-packages" in ab.__file__, ab.__file__
model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
report = ab.convert_(model, ab.CBN(window=4), example_inputs=images)
assert "converted" in str(report), report
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = model[1].weight.clone()
nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
assert not torch.equal(before, model[1].weight)
deploy = ab.fold(model.eval(), example_inputs=images)
assert not any(isinstance(layer, nn.BatchNorm2d) for layer in deploy.modules()), deploy
torch.testing.assert_close(deploy(images), model(images))
loaded = set({LAB!r}) & {{name.partition(".")[0] for name in sys.modules}}
assert not loaded, f"loaded {{sorted(loaded)}}"
"""

# Under --strict, the last line fails in a package without types: its ignore would be needed for nothing.
TYPED = """
import torch
from torch import Tensor, nn

import anybatch as ab

model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
images: Tensor = torch.randn(2, 3, 8, 8)
report: ab.Report = ab.convert_(model, ab.CBN(window=4), example_inputs=images)
deploy: nn.Module = ab.fold(model.eval(), example_inputs=images)
state = ab.history_state_dict(model)
wrong = ab.CBN(window="4")  # type: ignore[arg-type]
"""


class Failure(Exception):
    """A check that did not hold, and what was found."""


@dataclass(frozen=True)
class Fresh:
    """A new environment, and an empty folder to work in: the source tree is out of sight."""

    folder: Path
    python: Path

    def run(self, *command: str | Path, code: int = 0) -> str:
        """What the command printed; Failure unless it ends with `code`."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "MYPYPATH", "VIRTUAL_ENV", "ANYBATCH_TRACEBACK")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONWARNINGS"] = "ignore:Failed to initialize NumPy"  # torch's own, of every import without it
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = f"{' '.join(map(str, command))[:200]}\nexit code {done.returncode}\n{done.stdout}"
        hold(done.returncode == code, said)
        return done.stdout

    def install(self, what: str) -> None:
        pip = (self.python, "-m", "pip", "install", "--disable-pip-version-check", "-q")
        self.run(*pip, "-c", ROOT / "constraints.txt", what)

    def anybatch(self, *arguments: str, code: int = 0) -> str:
        return self.run(self.python.with_name("anybatch"), *arguments, code=code)


def hold(fact: bool, found: object) -> None:
    if not fact:
        raise Failure(str(found))


def sources() -> set[str]:
    """The package's files, named as in the wheel."""
    files = (path for path in (ROOT / "src/anybatch").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT / "src").as_posix() for path in files}


def check_archives(wheel: Path, sdist: Path) -> str:
    """Nothing of the package is left out of the wheel, nothing else is in it; the sdist has what `make test` needs."""
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    hold(there == sources(), f"the wheel and src differ in {sorted(there ^ sources())}")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"src/{name}" for name in sources()} | {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE"}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    hold(needed <= packed, f"the sdist lacks {sorted(needed - packed)}")
    return f"{len(there)} files in the wheel, {len(packed)} in the sdist"


def check_metadata(wheel: Path) -> str:
    """Name, version, licence, readme, extras and the typed marker, as an index would show them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        head = Parser().parsestr(archive.read(name).decode())
        licence = name.replace("METADATA", "licenses/LICENSE")
        hold(licence in archive.namelist(), f"no {licence}")
        hold("anybatch/py.typed" in archive.namelist(), "no py.typed")
    expected = {"Name": "anybatch", "Version": PROJECT["version"], "License-Expression": "MIT"}
    expected |= {"Description-Content-Type": "text/markdown", "Requires-Python": PROJECT["requires-python"]}
    found = {field: head[field] for field in expected}
    hold(found == expected, found)
    hold(str(head.get_payload()).startswith("# anybatch"), "the readme is not the description")
    hold(set(head.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"]), "other extras")
    plain = [line for line in head.get_all("Requires-Dist", []) if "extra ==" not in line]
    hold(plain == PROJECT["dependencies"], f"required without an extra: {plain}")
    hold(set(head.get_all("Classifier", [])) == set(PROJECT["classifiers"]), "other classifiers")
    return f"{head['Name']} {head['Version']}, {head['License-Expression']}, {len(PROJECT['classifiers'])} classifiers"


def check_alone(fresh: Fresh, wheel: Path) -> str:
    """Beside torch alone: import, convert, a step, fold; and the command line asks for its extra in one line."""
    fresh.install(str(wheel))
    listed = json.loads(fresh.run(fresh.python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"))
    installed = {each["name"].lower() for each in listed}
    hold(not installed & set(NOT_TORCHS), f"installed: {sorted(installed)}")
    fresh.run(fresh.python, "-c", LIBRARY)
    said = fresh.anybatch("--help", code=2)
    hold(bool(re.fullmatch(r"Error: the command line needs .*: pip install 'anybatch\[lab\]'\n", said)), said)
    return f"works with {len(installed)} packages installed: {', '.join(sorted(installed))}"


def check_types(fresh: Fresh) -> str:
    """A user's file under mypy --strict, against the installed package."""
    (fresh.folder / "typed.py").write_text(TYPED)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", fresh.python)
    return fresh.run(*mypy, "typed.py").strip()


def check_commands(fresh: Fresh, wheel: Path) -> str:
    """With the lab: the commands, in miniature, and the files they leave."""
    fresh.install(f"anybatch[lab] @ {wheel.as_uri()}")
    hold(fresh.anybatch("--version") == f"anybatch {PROJECT['version']}\n", "--version")
    hold(f"anybatch: {PROJECT['version']}\n" in fresh.anybatch("env"), "env")
    hold("\ncbn " in fresh.anybatch("methods"), "methods")
    small = ("--train-images", "64", "--test-images", "32", "--epochs", "1")
    fresh.anybatch("train", "--batch", "4", *small, "--out", "trained")
    left = {path.name for path in (fresh.folder / "trained").iterdir()}
    hold(left == {"model.safetensors", "training.pt", "config.json"}, left)
    said = fresh.anybatch("compare", "--quick", "--method", "cbn", "--batch", "4", *small, "--jobs", "1", "--out", "c")
    left = {path.name for path in (fresh.folder / "c").iterdir()}
    hold({"runs.jsonl", "report.html", "accuracy.png", "accuracy.svg"} <= left, left)
    runs = (fresh.folder / "c/runs.jsonl").read_text().splitlines()
    hold(len(runs) == 2 and "CBN" in said, said)
    return f"{PROJECT['name']} train, compare ({len(runs)} runs), methods and env"


def main(folder: Path, python: str) -> None:
    archives = [sorted(folder.resolve().glob(pattern)) for pattern in ("*.whl", "*.tar.gz")]
    if [len(found) for found in archives] != [1, 1]:
        sys.exit(f"FAILED  {folder} does not hold one wheel and one sdist: run make package")
    (wheel,), (sdist,) = archives
    with TemporaryDirectory() as place:
        subprocess.run([python, "-m", "venv", f"{place}/env"], check=True)
        (work := Path(place) / "work").mkdir()
        fresh = Fresh(work, Path(place) / "env/bin/python")
        checks = {
            "archives": lambda: check_archives(wheel, sdist),
            "metadata": lambda: check_metadata(wheel),
            "torch alone": lambda: check_alone(fresh, wheel),
            "types": lambda: check_types(fresh),
            "command line": lambda: check_commands(fresh, wheel),
        }
        for name, check in checks.items():
            try:
                print(f"ok      {name}: {check()}", flush=True)
            except Failure as failure:
                sys.exit(f"FAILED  {name}: {failure}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"), sys.argv[2] if len(sys.argv) > 2 else sys.executable)
