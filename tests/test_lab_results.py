import errno
import json
import os
from pathlib import Path

import pytest

from anybatch.errors import AnybatchError
from anybatch.lab.results import RUNS, Results
from anybatch.reporting import files

from .lab_fakes import result


def fill(folder: Path, seeds: int = 3) -> None:
    with Results(folder) as results:
        for seed in range(seeds):
            results.add(result(seed=seed))


def test_round_trip(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "r")
    with Results(tmp_path / "deep" / "r") as results:
        assert list(results.runs.values()) == [result(seed=seed) for seed in range(3)]
        assert not results.warnings
    for line in (tmp_path / "deep" / "r" / RUNS).read_text().splitlines():
        assert json.loads(line)["machine"]["cores"] == 2


@pytest.mark.parametrize(
    "damage", [lambda line: line[:40], lambda line: "{}", lambda line: "[1]", lambda line: line.replace("80.0", '"x"')]
)
def test_damaged_line_is_set_aside_not_dropped(tmp_path: Path, damage: object) -> None:
    fill(tmp_path)
    lines = (tmp_path / RUNS).read_text().splitlines()
    lines[1] = damage(lines[1])
    (tmp_path / RUNS).write_text("\n".join(lines))
    with Results(tmp_path) as results:
        assert set(results.runs) == {"bn-32-0", "bn-32-2"}
        assert len(results.warnings) == 1
        assert "line 2" in results.warnings[0]
    assert (tmp_path / f"{RUNS}.corrupt").read_text() == lines[1] + "\n"
    with Results(tmp_path) as results:
        assert len(results.runs) == 2
        assert not results.warnings


def test_bytes_that_are_no_text_are_kept_as_they_were(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with (tmp_path / RUNS).open("ab") as file:
        file.write(b"\xff\xfe\x00\n")
    with Results(tmp_path) as results:
        assert len(results.runs) == 1
    assert (tmp_path / f"{RUNS}.corrupt").read_bytes() == b"\xff\xfe\x00\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fill(tmp_path)
    before = (tmp_path / RUNS).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Results(tmp_path) as results:
        monkeypatch.setattr(files.os, call, full)
        with pytest.raises(AnybatchError, match=r"the disk of .* is full; 3 finished runs are safe there: make room"):
            results.add(result(seed=3))
        monkeypatch.undo()
    assert (tmp_path / RUNS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", RUNS]


def test_two_comparisons_in_one_folder(tmp_path: Path) -> None:
    with Results(tmp_path), pytest.raises(AnybatchError, match="another comparison is writing"):
        Results(tmp_path)
    Results(tmp_path).__exit__(None, None, None)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(AnybatchError, match="cannot write to the results folder"):
        Results(tmp_path / "f")
