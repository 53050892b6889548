"""`anybatch train` stopped and resumed: by signal, in mid-epoch, on one process and on several, with every method."""

import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import AnybatchError
from anybatch.lab.checkpoint import State
from anybatch.lab.classify import Classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.networks import NETWORKS, small_resnet
from anybatch.lab.schedule import Order, Schedule
from anybatch.lab.training import Stopped, train_run

from . import lab_fakes
from .lab_children import STEP, assert_same, state, train, train_together
from .tolerances import REORDERED

DATA = lab_fakes.dataset(96)
CONFIG = ClassifyConfig(method="cbn(window=3)", batch=8, epochs=2, lr=0.05)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab_fakes.image_folder(tmp_path_factory.mktemp("images"), {"red": 60, "green": 60}, size=8)


@pytest.fixture(scope="module")
def options(images: Path) -> list[str]:
    """96 images of 8 pixels: three steps an epoch."""
    small = ["--data", str(images), "--image-size", "8", "--train-images", "96", "--test-images", "16"]
    return [*small, "--method", "cbn(window=3)", "--epochs", "2", "--lr", "0.05"]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(*options, "--batch", "8", "--out", str(out)).code == 0
    return out


def after(steps: int):
    """A wish to stop that comes after so many steps."""
    left = iter(range(steps, -1, -1))
    next(left)
    return lambda: next(left, 0) == 0


@pytest.mark.parametrize("name", ab.METHODS)
def test_every_method_resumes_in_mid_epoch(tmp_path: Path, name: str) -> None:
    """Weights, running statistics, history, optimizer, random numbers, losses: bit for bit, wherever it stopped."""
    config = replace(CONFIG, method=ab.METHODS[name].trial)
    train_run(Classify(config, DATA), checkpoint=tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", stop=after(1))
    torch.manual_seed(999)
    with pytest.raises(Stopped):
        train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", stop=after(3), resume=True)
    train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", resume=True)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_random_numbers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with dropout sees the masks that it would have seen."""
    monkeypatch.setitem(NETWORKS, "dropping", lambda *shape: nn.Sequential(small_resnet(*shape), nn.Dropout(0.3)))
    config = replace(CONFIG, network="dropping")
    train_run(Classify(config, DATA), checkpoint=tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", stop=after(2))
    train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", resume=True)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_random_numbers_are_those_of_the_models_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: --device cuda:1 without torchrun."""
    device, kept = torch.device("cuda:1"), {}
    monkeypatch.setattr(State, "_device", device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda which: torch.tensor([7, which.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda rng, which: kept.update({which: rng.tolist()}))
    model = nn.Linear(2, 2)
    before = State(model, torch.optim.SGD(model.parameters(), 0.1))
    saved = {"model": model.state_dict(), "optimizer": before.optimizer.state_dict(), "counters": {}}
    before.take(saved | {"processes": [before.own()]}, 0)
    assert kept == {device: [7, 1]}


def test_steps_of_single_micro_batches_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, mode="step")
    train_run(Classify(config, DATA), checkpoint=tmp_path / "whole")
    with pytest.raises(Stopped) as stopped:
        train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", stop=after(5))
    assert stopped.value.done.images == 40
    train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", resume=True)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_saves_every_so_many_steps(tmp_path: Path) -> None:
    """Steps 2, 4 and 6 of the run, and the end of each epoch of three; the save before is kept each time."""
    saved = []

    def look(progress: object) -> None:
        names = ("training.previous.pt", "training.pt")
        there = [state(tmp_path / "run", name) for name in names if (tmp_path / "run" / name).exists()]
        saved.append([each["counters"]["images"] // 32 for each in there])

    train_run(
        Classify(CONFIG, DATA), look, checkpoint=tmp_path / "run", save_every=2
    )  # called after a step, before its save
    assert saved == [[], [], [2], [2, 3], [3, 4], [3, 4]]
    assert state(tmp_path / "run")["counters"]["images"] == 192
    assert state(tmp_path / "run", "training.previous.pt")["counters"]["images"] == 128


def test_order_depends_on_the_position_alone() -> None:
    whole = Order(5, 70, 64)
    parts = [whole.after(images, 16) for images in range(0, 192, 16)]
    for index, part in enumerate(parts):
        assert torch.equal(Order(5, 70, 64).after(16 * index, 16), part)
    assert torch.cat(parts[:4]).unique().numel() == 64
    assert not torch.equal(parts[0], parts[4])


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path, options: list[str], whole: Path, sent: int, code: int
) -> None:
    """In the second micro-batch of the second step; the command that it names does the rest, bit for bit."""
    out = tmp_path / "run"
    ended = train(*options, "--batch", "8", "--out", str(out), signals={STEP + 2: sent})
    assert ended.code == code
    assert ended.output.count("\n") == 1
    assert f"Stopped after 64 images, all saved in {out}" in ended.output
    command = shlex.split(re.search(r"To go on: (.*)\n", ended.output)[1])
    assert command[:2] == ["anybatch", "train"]
    assert state(out)["counters"]["images"] == 64
    resumed = train(*command[2:])
    assert resumed.code == 0, resumed.output
    assert_same(state(out), state(whole))
    again = train(*command[2:])
    assert again.code == 0
    assert "the run is finished: nothing is left to train" in again.output
    assert "Checkpoint:" in again.output


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, options: list[str], whole: Path) -> None:
    """In the same step; what was saved before it is whole, and the steps since are all that is lost."""
    out = tmp_path / "run"
    arguments = [*options, "--batch", "8", "--out", str(out)]
    moments = train(*arguments, signals={3 * STEP: signal.SIGTERM}).moments  # to the end of epoch 1 and its save
    out.rename(tmp_path / "first")
    ended = train(*arguments, signals={moments + 1: signal.SIGINT, moments + 2: signal.SIGINT})
    assert ended.code == 130
    assert ended.moments == moments + 2
    assert ended.output == "Interrupted.\n"
    assert state(out)["counters"]["images"] == 96
    assert train(*arguments, "--resume").code == 0
    assert_same(state(out), state(whole))


@pytest.fixture(scope="module")
def whole_of_two(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    ended = train_together((*options, "--batch", "4", "--out", str(out)), [{}, {}])
    assert [each.code for each in ended] == [0, 0]
    assert "CBN" in ended[0].output
    assert ended[1].output == ""  # one prints
    return out


def test_two_processes_train_what_one_does(options: list[str], whole_of_two: Path, tmp_path: Path) -> None:
    """GroupNorm sees one image at a time: two processes make the steps of one, up to the order of sums."""
    weights = []
    for count in (1, 2):
        out = tmp_path / str(count)
        arguments = (*options, "--method", "gn(groups=4)", "--batch", "4", "--epochs", "1", "--out", str(out))
        assert [each.code for each in train_together(arguments, [{}] * count)] == [0] * count
        weights.append(state(out))
    for name, weight in weights[0]["model"].items():
        torch.testing.assert_close(weights[1]["model"][name], weight, **REORDERED)
    losses = [torch.tensor(each["counters"]["train_loss"]) for each in weights]
    torch.testing.assert_close(*losses, **REORDERED)
    histories = [part["history"]["layers"]["bn1"]["0"]["scalars"] for part in state(whole_of_two)["processes"]]
    assert not torch.equal(*histories)  # CBN's are of each process's own images


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_stops_both_at_one_step(
    tmp_path: Path, options: list[str], whole_of_two: Path, rank: int
) -> None:
    out = tmp_path / "run"
    arguments = (*options, "--batch", "4", "--out", str(out))
    signals = [{}, {}]
    signals[rank] = {STEP + 2: signal.SIGTERM}
    ended = train_together(arguments, signals)
    assert [each.code for each in ended] == [143, 143]
    assert "To go on: torchrun --nproc-per-node=2 -m anybatch train" in ended[0].output
    assert ended[1].output == ""
    saved = state(out)
    assert saved["counters"]["images"] == 64
    assert [part["history"]["layers"]["bn1"]["0"]["forwards"].item() for part in saved["processes"]] == [8, 8]
    ended = train_together((*arguments, "--resume"), [{}, {}])
    assert [each.code for each in ended] == [0, 0]
    assert_same(state(out), state(whole_of_two))


def test_four_processes_resume(tmp_path: Path, options: list[str]) -> None:
    """The last bit of a sum over more than two depends on the order of its terms, which must not change."""
    arguments = (*options, "--batch", "8", "--epochs", "1", "--out")
    train_together((*arguments, str(tmp_path / "whole")), [{}] * 4)
    ended = train_together((*arguments, str(tmp_path / "parts")), [{}, {}, {}, {1: signal.SIGTERM}])
    assert [each.code for each in ended] == [143] * 4
    assert state(tmp_path / "parts")["counters"]["images"] == 32
    train_together((*arguments, str(tmp_path / "parts"), "--resume"), [{}] * 4)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_another_number_of_processes_drops_the_history_and_says_so(tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "run"
    arguments = (*options, "--batch", "4", "--out", str(out))
    train_together(arguments, [{STEP: signal.SIGTERM}, {}])
    ended = train(*arguments, "--resume")
    assert ended.code == 0
    assert "Note: saved by 2 processes, resumed by 1: the layers' history is dropped\n" in ended.output
    assert len(state(out)["processes"]) == 1


def test_processes_that_do_not_divide_the_gradient_batch() -> None:
    with pytest.raises(AnybatchError, match="3 processes with batch 4 see 12 examples at once, which does not divide"):
        Schedule.of(replace(CONFIG, batch=4), 96, 3)
