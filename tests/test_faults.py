"""The fault table of docs/reliability.md: what happens to a run, and that nothing is lost by it.

A run is the real command line in a process of its own, on made-up images; moments of it are counted (lab_children.py).
"""

import contextlib
import errno
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anybatch.errors import AnybatchError
from anybatch.lab import checkpoint as checkpoints
from anybatch.lab import workers
from anybatch.reporting import files

from . import lab_fakes
from .lab_children import EVALUATION, MOMENTS_OF_A_SAVE, STEP, assert_same, state, train, train_together
from .selection import usually

KILLS = 20


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six steps, each one saved."""
    images = lab_fakes.image_folder(tmp_path_factory.mktemp("images"), {"red": 60, "green": 60}, size=8)
    small = ["--data", str(images), "--image-size", "8", "--train-images", "96", "--test-images", "16"]
    return [*small, "--method", "cbn(window=3)", "--batch", "8", "--epochs", "2", "--lr", "0.05", "--save-every", "1"]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a whole run, and the number of its moments."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(*options, "--out", str(out))
    assert ended.code == 0, ended.output
    return out, ended.moments


def go_on(options: list[str], out: Path) -> None:
    """Resumes to the end, or starts anew where nothing had been saved yet."""
    saved = any((out / name).exists() for name in (checkpoints.TRAINING, checkpoints.PREVIOUS))
    ended = train(*options, "--out", str(out), *(["--resume"] if saved else []))
    assert ended.code == 0, ended.output


def assert_nothing_lost(out: Path, whole: Path) -> None:
    """Weights, running statistics, history, optimizer, random numbers, losses and counters, bit for bit."""
    assert_same(state(out), state(whole))
    names = {checkpoints.MODEL, checkpoints.TRAINING, checkpoints.PREVIOUS, checkpoints.CONFIG}
    assert {path.name for path in out.iterdir()} == names
    assert (out / checkpoints.MODEL).read_bytes() == (whole / checkpoints.MODEL).read_bytes()


@pytest.mark.parametrize("kill", usually(range(0, KILLS, 4), range(KILLS)))
def test_killed_at_a_random_moment(
    tmp_path: Path, options: list[str], undisturbed: tuple[Path, int], kill: int
) -> None:
    """One moment out of every twentieth of the run: a forward, a step, half of a file, a rename."""
    whole, moments = undisturbed
    moment = random.Random(kill).randint(1 + kill * moments // KILLS, (kill + 1) * moments // KILLS)
    out = tmp_path / "run"
    assert train(*options, "--out", str(out), signals={moment: signal.SIGKILL}).code == -signal.SIGKILL
    go_on(options, out)
    assert_nothing_lost(out, whole)


@pytest.mark.parametrize("before", ["the old one is renamed", "the new one is renamed", "the folder is synced"])
def test_killed_in_the_last_save(
    tmp_path: Path, options: list[str], undisturbed: tuple[Path, int], before: str
) -> None:
    """Around the renames of training.pt: there is always a whole one, and a finished run has its model."""
    whole, moments = undisturbed
    left = {"the old one is renamed": 3, "the new one is renamed": 2, "the folder is synced": 1}[before]
    out = tmp_path / "run"
    assert train(*options, "--out", str(out), signals={moments - left: signal.SIGKILL}).code == -signal.SIGKILL
    assert (out / checkpoints.TRAINING).exists() == (before != "the new one is renamed")
    assert state(out, checkpoints.PREVIOUS)["counters"]["images"] == {3: 4, 2: 5, 1: 5}[left] * 32
    go_on(options, out)
    assert_nothing_lost(out, whole)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_disk_full_while_saving(
    tmp_path: Path, options: list[str], undisturbed: tuple[Path, int], share: float
) -> None:
    """The system refuses every byte beyond a share of training.pt; then there is room again."""
    whole, _ = undisturbed
    out = tmp_path / "run"
    train(*options, "--out", str(out), signals={5 * 3: signal.SIGTERM})
    before = state(out)
    limit = int(share * (out / checkpoints.TRAINING).stat().st_size)
    ended = train(*options, "--out", str(out), "--resume", limit=limit)
    assert ended.code == 2
    assert re.fullmatch(
        r"Error: the checkpoint cannot be saved to .* \(File too large\): make room, then go on with --resume from the "
        r"one before, which is whole\n",
        ended.output,
    )
    assert_same(state(out), before)
    go_on(options, out)
    assert_nothing_lost(out, whole)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Where the system has taken every byte and says only then that it has no room: the old file stays."""
    path, kept = tmp_path / "file", tmp_path / "kept"
    files.write_atomically(path, b"1", kept)
    files.write_atomically(path, b"2", kept)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"3", kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"2", b"1")
    assert {each.name for each in tmp_path.iterdir()} == {"file", "kept"}


def test_one_of_two_ranks_killed(tmp_path: Path, options: list[str]) -> None:
    """torchrun ends the other; the last save is whole, and going on is bit for bit what would have come anyway."""
    arguments = [*options, "--batch", "4"]
    assert [each.code for each in train_together((*arguments, "--out", str(tmp_path / "whole")), [{}, {}])] == [0, 0]
    out = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--monitor-interval=0.1",
    ]
    child = [*torchrun, "-m", "tests.lab_children", "1", str(STEP * 3 + 2), *arguments, "--out", str(out)]
    ended = subprocess.run(child, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert ended.returncode == 1, ended.stderr
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert state(out)["counters"]["images"] == 3 * 32
    ended_well = train_together((*arguments, "--out", str(out), "--resume"), [{}, {}])
    assert [each.code for each in ended_well] == [0, 0]
    assert_nothing_lost(out, tmp_path / "whole")


def test_ctrl_c_while_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after: a worker of `anybatch compare` that is not told what to do would end with a traceback."""
    spawn = multiprocessing.util.spawnv_passfds

    def interrupted(*arguments: object) -> int:
        pid = spawn(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return pid

    multiprocessing.resource_tracker.ensure_running()  # so that it is the worker that is spawned
    others = multiprocessing.active_children()  # of other tests
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers._Worker(None)
    (started,) = [child for child in multiprocessing.active_children() if child not in others]
    started.kill()
    started.join()


@pytest.fixture
def stopped(tmp_path: Path, options: list[str]) -> Path:
    """A run that stopped after its third step, with the save before it."""
    out = tmp_path / "run"
    assert train(*options, "--out", str(out), signals={2 * MOMENTS_OF_A_SAVE + 3 * STEP: signal.SIGTERM}).code == 143
    return out


DAMAGE = {
    "empty": lambda content: b"",
    "half of it": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "a byte changed": lambda content: content[: len(content) // 2] + b"\x55" + content[len(content) // 2 + 1 :],
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_checkpoint(
    options: list[str], stopped: Path, undisturbed: tuple[Path, int], damage: Callable[[bytes], bytes]
) -> None:
    """Refused in one line, and the one before is taken; with that one damaged too there is one clear error."""
    training, previous = stopped / checkpoints.TRAINING, stopped / checkpoints.PREVIOUS
    training.write_bytes(damage(training.read_bytes()))
    whole_previous = previous.read_bytes()
    previous.write_bytes(damage(whole_previous))
    ended = train(*options, "--out", str(stopped), "--resume")
    assert ended.code == 2
    assert ended.output.startswith(f"Error: the checkpoint in {stopped} is damaged (training.pt is refused, it is ")
    assert "; training.previous.pt is refused, it is " in ended.output
    assert ended.output.count("\n") == 1
    previous.write_bytes(whole_previous)
    # Killed at the last moment of the next save: the damaged one must not have taken the place of the good one.
    last = STEP + EVALUATION + MOMENTS_OF_A_SAVE - 1
    ended = train(*options, "--out", str(stopped), "--resume", signals={last: signal.SIGKILL})
    assert ended.code == -signal.SIGKILL
    assert previous.read_bytes() == whole_previous
    note = r"Note: training.pt is refused, it is .*; training.previous.pt is taken, the save before it\n"
    assert re.fullmatch(note, ended.output)
    go_on(options, stopped)
    assert_nothing_lost(stopped, undisturbed[0])


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def _bare(hostile: Hostile, file: Path) -> None:
    file.write_bytes(pickle.dumps(hostile))


def _as_torch_saves(hostile: Hostile, file: Path) -> None:
    torch.save({"model": hostile}, file)


def _in_a_true_checkpoint(hostile: Hostile, file: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "fingerprint": hostile}, file)


@pytest.mark.parametrize("plant", [_bare, _as_torch_saves, _in_a_true_checkpoint])
def test_hostile_pickle(
    tmp_path: Path,
    options: list[str],
    stopped: Path,
    undisturbed: tuple[Path, int],
    plant: Callable[[Hostile, Path], None],
) -> None:
    """As training.pt, as both of its kind, as model.safetensors: refused, and what it holds is not run."""
    made = tmp_path / "made by the pickle"
    training, previous, model = (
        stopped / name for name in (checkpoints.TRAINING, checkpoints.PREVIOUS, checkpoints.MODEL)
    )
    good = previous.read_bytes()
    plant(Hostile(made), training)
    plant(Hostile(made), previous)
    ended = train(*options, "--out", str(stopped), "--resume")
    assert ended.code == 2
    assert "training.pt is refused" in ended.output
    assert "weights_only" not in ended.output
    model.write_bytes(training.read_bytes())
    with pytest.raises(AnybatchError, match="is damaged"):
        checkpoints.load_model(stopped)
    previous.write_bytes(good)
    go_on(options, stopped)
    assert not made.exists()
    assert_nothing_lost(stopped, undisturbed[0])
    plant(Hostile(made), training)
    with contextlib.suppress(RuntimeError):  # a bare pickle is nothing that torch saved, but that comes after
        torch.load(training, weights_only=False)
    assert made.exists()
