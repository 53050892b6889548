"""anybatch study --check: published rows, run anew."""

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from anybatch.lab import machine
from anybatch.lab.studies import checking
from anybatch.lab.studies.publishing import published_runs

from .study_files import publish_tiny, run, work_here


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_here(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_tiny(tmp_path_factory.mktemp("published"))


def doctored(published: Path, folder: Path, **changes: object) -> Path:
    """The published study with one value of every run changed; of a table, with the values in it changed."""
    folder = folder / "doctored"
    folder.mkdir()
    records = [json.loads(line) for line in (published / "tiny.jsonl").read_text().splitlines()]
    for record in records:
        for name, value in changes.items():
            record[name] = record[name] | value if isinstance(value, dict) else value
    (folder / "tiny.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def test_rows_come_out_as_published_to_the_digit(
    folder: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_source_of", lambda commit: commit == "0123456789ab")
    there = doctored(published, folder, commit="0123456789ab")
    code, output = run("--check", str(there), "--rows", "4")
    assert code == 0
    assert "4 of 8 published runs, drawn with seed 0" in output
    assert len(re.findall(r"tiny +\S.*, seed \d .*\+0\.0000 \(0\) +– +as published", output)) == 4
    assert "4 of 4 rows are as published" in output


def test_a_row_that_is_off_fails(folder: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_source_of", lambda commit: True)
    there = doctored(published, folder, commit="0123456789ab", accuracy=20.5)
    code, output = run("--check", str(there), "--rows", "1")
    assert code == 1
    assert re.search(r"Off: .*, seed \d: it is -\d+\.\d\d points from what was published, 0 are allowed", output)
    assert "0 of 1 rows are as published" in output
    # Elsewhere there is a tolerance, which is the reader's to choose.
    doctor = {"commit": None, "accuracy": 20.5, "machine": {"cpu": "another"}}
    (there / "tiny.jsonl").unlink()
    there.rmdir()
    there = doctored(published, folder, **doctor)
    code, output = run("--check", str(there), "--rows", "1")
    assert code == 1
    assert "3 are allowed" in output
    assert "machine, source" in output
    code, output = run("--check", str(there), "--rows", "1", "--tolerance", "50")
    assert code == 0
    assert re.search(r" \(50\) +machine, source +as published", output)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "0" * 12}, "the data are not those that it was published with"),
        ({"norm": "CBN(window=3)", "key": "1" * 16}, r"the method is .* today, published it was CBN\(window=3\)"),
        ({"status": "diverged", "accuracy": None}, "it has finished, published it had diverged"),
        ({"config": {"network": "no-network"}}, "it failed: there is no network 'no-network'"),
    ],
)
def test_what_is_off_is_said(folder: Path, published: Path, changes: dict[str, object], reason: str) -> None:
    there = doctored(published, folder, **changes)
    if "key" in changes:  # runs of one key are one
        (there / "tiny.jsonl").write_text((there / "tiny.jsonl").read_text().splitlines()[0] + "\n")
    code, output = run("--check", str(there), "--rows", "1")
    assert code == 1
    assert re.search(rf"Off: .*: {reason}", output)


def test_elsewhere_a_row_may_be_off_by_as_much_as_its_seeds_lie_apart(folder: Path, published: Path) -> None:
    there = doctored(published, folder, commit=None, accuracy=99.0)
    records = [json.loads(line) for line in (there / "tiny.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | ({"accuracy": 1.0} if record["config"]["seed"] else {})) for record in records]
    (there / "tiny.jsonl").write_text("\n".join(lines) + "\n")
    assert {each.spread for each in checking.draw(there, 100, 0).runs} == {98.0}
    code, output = run("--check", str(there), "--rows", "2")
    assert code == 0
    assert output.count("(98)") == 2


def test_the_draw(folder: Path, published: Path) -> None:
    first, again, other = (checking.draw(published, 3, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(checking.draw(published, 100, 0).runs) == 8
    results = published_runs(published / "tiny.jsonl")
    times = sorted(each.seconds for each in results)
    cut = next((a + b) / 2 for a, b in pairwise(times) if b > a)
    sample = checking.draw(published, 100, 0, longest=cut)
    assert {each.run.key for each in sample.runs} == {each.key for each in results if each.seconds <= cut}
    assert (sample.published, sample.longer, sample.elsewhere) == (8, 8 - len(sample.runs), 0)
    code, output = run("--check", str(published), "--rows", "1", "--longest", f"{cut}")
    assert code == 0
    assert f"Left out: {sample.longer} that took longer than {cut:g} s" in output
    # Varied fields belong to the name of a run; a run that two studies share is drawn once.
    folder = doctored(published, folder)
    (folder / "second.jsonl").write_text((folder / "tiny.jsonl").read_text())
    assert checking.draw(folder, 100, 0).published == 8
    assert {each.study for each in checking.draw(folder, 100, 0, study="second").runs} == {"second"}
    (folder / "second.jsonl").unlink()
    varied = [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]
    varied[0]["config"]["lr"] = 0.25
    (folder / "tiny.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in varied))
    named = sorted(each.name.rpartition(", ")[2] for each in checking.draw(folder, 100, 0).runs)
    assert named == ["learning rate 0.1"] * 7 + ["learning rate 0.25"]


def test_what_cannot_be_checked(folder: Path, published: Path) -> None:
    code, output = run("--check")
    assert code == 2
    assert "there are no published studies in docs/results/studies: give the folder that has some, or publish" in output
    code, output = run("window", "--check")
    assert code == 2
    assert "there is no published study 'window' in docs/results/studies: give the folder" in output
    assert "publish with anybatch study window --publish docs/results/studies" in output
    code, output = run("windo", "--check")
    assert code == 2
    assert "there are no published studies in windo: did you mean 'window'?" in output
    code, output = run("--check", str(published), "--longest", "0")
    assert code == 2
    assert "of 8 published runs 8 took longer than --longest (the shortest took " in output
    assert "and 0 need a device that is not here" in output
    there = doctored(published, folder, config={"device": "nonsense"})
    code, output = run("--check", str(there))
    assert code == 2
    assert "of 8 published runs 0 took longer" in output
    assert "and 8 need a device that is not here: nothing is left to check" in output
    code, output = run("there.toml", "--check")
    assert code == 2
    assert "--check takes the folder that there.toml was published in" in output
    lines = (published / "tiny.jsonl").read_text().splitlines()
    (there / "tiny.jsonl").write_text(f"{lines[0]}\n{lines[1][:50]}\n")
    code, output = run("--check", str(there))
    assert code == 2
    assert re.search(r"line 2 of .*tiny.jsonl is damaged \(.*\): publish the study again", output)
    (there / "tiny.jsonl").write_bytes(b"\xff\xfe")
    assert "tiny.jsonl cannot be read" in run("--check", str(there))[1]
    code, output = run("--check", str(published), "--tolerance", "-1")
    assert (code, "--tolerance is -1: give at least 0 points" in output) == (2, True)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--check", "--seeds", "2"], "--seeds goes without --check"),
        (["--check", "--publish", "x"], "--publish goes without --check"),
        (["window", "--rows", "2"], "--rows goes with --check"),
        (["window", "--longest", "2"], "--longest goes with --check"),
        (["--seeds", "2"], "--seeds goes with the name of a study; 'anybatch study' lists them"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, typed: list[str], message: str) -> None:
    code, output = run(*typed)
    assert (code, message in output) == (2, True)


def test_the_source_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "anybatch" / "lab" / "machine.py"
    module.parent.mkdir(parents=True)
    module.write_text("one")
    monkeypatch.setattr(machine, "__file__", str(module))
    machine.is_source_of.cache_clear()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"], ["tag", "one"]):
        subprocess.run([*git, *command], check=True)
    assert machine.is_source_of("HEAD")
    assert not machine.is_source_of("nothing")
    (tmp_path / "page.md").write_text("beside the package")
    for command in (["add", "."], ["commit", "-q", "-m", "two"]):
        subprocess.run([*git, *command], check=True)
    assert machine.is_source_of("HEAD~1")
    module.write_text("two")
    assert not machine.is_source_of("one")
    machine.is_source_of.cache_clear()
