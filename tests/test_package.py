"""What is shipped: its files, its metadata, and what the repository tells those who contribute.

That the wheel installs and works in a fresh environment is `make package`, which takes minutes.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from scripts import check_package

import anybatch as ab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of the tree, the wheel made of the sdist; docs, which are large, stay away."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("src", "tests", "scripts", ".github", ".ci"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_have_every_file(archives: tuple[Path, Path]) -> None:
    assert "files in the wheel" in check_package.check_archives(*archives)
    assert "anybatch/py.typed" in check_package.sources()


def test_metadata_is_what_an_index_shows(archives: tuple[Path, Path]) -> None:
    assert check_package.check_metadata(archives[0]).startswith(f"anybatch {ab.__version__}, MIT")


def test_a_file_left_out_is_named(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """As where a folder of assets is missing in package-data."""
    less = tmp_path / archives[0].name
    with zipfile.ZipFile(archives[0]) as old, zipfile.ZipFile(less, "w") as new:
        for name in old.namelist():
            if name != "anybatch/py.typed":
                new.writestr(name, old.read(name))
    with pytest.raises(check_package.Failure, match=r"\['anybatch/py.typed'\]"):
        check_package.check_archives(less, archives[1])
    with pytest.raises(check_package.Failure, match=r"no py.typed"):
        check_package.check_metadata(less)


def test_a_failed_command_is_shown(tmp_path: Path) -> None:
    fresh = check_package.Fresh(tmp_path, Path(sys.executable))
    assert fresh.run(sys.executable, "-c", "print(1)") == "1\n"
    with pytest.raises(check_package.Failure, match=r"exit code 3\nwhy"):
        fresh.run(sys.executable, "-c", "print('why'); raise SystemExit(3)")


def test_an_empty_folder_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not hold one wheel and one sdist"):
        check_package.main(tmp_path, sys.executable)


@pytest.mark.parametrize("pattern", PROJECT["tool"]["setuptools"]["package-data"]["anybatch"])
def test_package_data_match_files(pattern: str) -> None:
    assert list((ROOT / "src/anybatch").glob(pattern))


def test_one_version() -> None:
    assert ab.__version__ == PROJECT["project"]["version"] == version("anybatch")


def test_every_constraint_is_one_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len({line.partition("==")[0].lower() for line in lines}) == len(lines)


def test_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"\bmake (\w+)", text)) <= {*TARGETS}
    parts = re.findall(r"^      (\S+)  ", text, re.MULTILINE)
    assert len(parts) >= 10
    assert all((ROOT / "src/anybatch" / part).exists() for part in parts)
    for path in re.findall(r"\btests/\w+\.py", text):
        assert (ROOT / path).exists(), path
    assert len(text.splitlines()) <= 100


def test_ci_runs_what_a_change_must_pass() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert runs["test"] == ["make lint", "make test"]
    assert {run.removeprefix("make ") for steps in runs.values() for run in steps} <= {*TARGETS}
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    said = [line for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert {line.rpartition(" ")[2] for line in said} <= {*tested}


def test_a_bug_report_asks_for_the_environment() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    labels = [field["attributes"]["label"] for field in form["body"]]
    assert labels[0] == "What `anybatch env` prints"
    assert all(field["validations"]["required"] for field in form["body"])
