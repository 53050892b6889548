import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from anybatch.errors import AnybatchError
from anybatch.lab import compare as lab
from anybatch.lab.compare import FULL, QUICK, compare, plan, schedule
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.display import Display
from anybatch.lab.results import RUNS
from anybatch.lab.workers import Advanced, Event, Failed, Finished, Started, run_all
from anybatch.methods import METHODS

from .lab_fakes import image_folder, interrupted


@pytest.fixture
def base(tmp_path: Path) -> ClassifyConfig:
    folder = image_folder(tmp_path / "images", {"red": 30, "green": 30})
    return ClassifyConfig(data=str(folder), image_size=8, epochs=1)


def display() -> Display:
    return Display(Console(quiet=True), 1)


def test_plan_has_every_run_once() -> None:
    configs = plan(ClassifyConfig(), FULL.methods, FULL.batches, FULL.seeds)
    assert len(configs) == len(set(configs)) == (1 + 5 * 3) * 3
    assert sum(c.method == "bn" and c.batch == 32 for c in configs) == 3
    assert len(plan(ClassifyConfig(), QUICK.methods, QUICK.batches, QUICK.seeds)) == 7
    assert len(plan(ClassifyConfig(), ["bn"], [32], 2)) == 2


def test_schedule_is_seed_by_seed_reference_first_then_longest() -> None:
    configs = schedule(plan(ClassifyConfig(), ["bn", "cbn"], [1, 4], 2))
    assert [c.seed for c in configs] == [0] * 5 + [1] * 5
    assert [(c.method, c.batch) for c in configs[:5]] == [("bn", 32), ("cbn", 1), ("cbn", 4), ("bn", 1), ("bn", 4)]


def test_runs_are_kept_and_never_done_again(
    tmp_path: Path, base: ClassifyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = plan(base, ["gn"], [16], 1)
    outcome = compare(configs, tmp_path / "out", 2, display())
    assert [r.config for r in outcome.results] == configs
    assert not outcome.failures
    before = (tmp_path / "out" / RUNS).read_bytes()

    planned: list[ClassifyConfig] = []

    def none_run(todo: list[ClassifyConfig], jobs: int, pictures: Path) -> Iterator[Event]:
        planned.extend(todo)
        yield from ()

    monkeypatch.setattr(lab, "run_all", none_run)
    again = compare(configs, tmp_path / "out", 2, display())
    assert (again.reused, again.results, planned) == (2, outcome.results, [])
    assert (tmp_path / "out" / RUNS).read_bytes() == before

    # One damaged line: that run is planned again, no other.
    lines = before.decode().splitlines()
    (tmp_path / "out" / RUNS).write_text(f"{lines[0]}\n{lines[1][:100]}\n")
    assert compare(configs, tmp_path / "out", 2, display()).reused == 1
    assert len(planned) == 1


def test_a_failed_or_killed_run_leaves_the_others(base: ClassifyConfig) -> None:
    fails = replace(base, device="nonsense")
    killed, good = replace(base, seed=1), replace(base, seed=2)
    events = []
    others = multiprocessing.active_children()  # of other tests
    with closing(run_all([fails, killed, good], jobs=1)) as stream:
        for event in stream:
            events.append(event)
            if event == Started(killed):
                (own,) = [child for child in multiprocessing.active_children() if child not in others]
                own.kill()
    ends = {event.config: event for event in events if isinstance(event, Finished | Failed)}
    assert "device 'nonsense' cannot be used" in ends[fails].reason
    assert "its process ended with exit code -9" in ends[killed].reason
    assert ends[good].result.status == "finished"


def test_wrong_plans_are_refused_before_any_run(tmp_path: Path, base: ClassifyConfig) -> None:
    with pytest.raises(AnybatchError, match="unknown method 'cnb'"):
        compare(plan(base, ["cnb"], [1], 1), tmp_path / "out", 1, display())
    with pytest.raises(AnybatchError, match="device 'nonsense' cannot be used"):
        compare(plan(replace(base, device="nonsense"), ["bn"], [1], 1), tmp_path / "out", 1, display())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path, base: ClassifyConfig) -> None:
    command = [sys.executable, "-m", "anybatch.cli", "compare", "--data", base.data, "--epochs", "200", "--jobs", "1"]
    command += ["--method", "bn", "--batch", "1", "--seeds", "1", "--out", str(tmp_path / "out")]
    code, rest = interrupted(command, "runs to do", limit=60)
    assert code == 130
    assert "0 of 2 runs are finished and safe" in rest.replace("\n", " ")
    assert "To go on: anybatch compare --data" in rest
    assert "Traceback" not in rest


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_that_still_imports_leaves_ctrl_c_to_its_parent(base: ClassifyConfig) -> None:
    """Ctrl-C reaches the whole group, this one long before any line of ours has run in it."""
    others = set(multiprocessing.active_children())
    with closing(run_all([base], 1)) as events:
        first = next(events)
        (process,) = set(multiprocessing.active_children()) - others
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert [type(event) for event in (first, *events) if not isinstance(event, Advanced)] == [Started, Finished]


def test_all_is_the_whole_table_as_fits_the_network() -> None:
    base = ClassifyConfig(epochs=1)
    typed = [c.method for c in plan(base, ["all"], [2], 1)]
    assert typed == ["bn", *(row.trial for row in METHODS.values())]
    wide = [c.method for c in plan(replace(base, network="resnet18"), ["all", "cbn"], [2], 1)]
    assert wide == ["bn", *METHODS]
