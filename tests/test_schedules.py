"""Steps and warm-up of the learning rate, beside torch's own schedulers; the cosine is in test_lab_training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR

from anybatch.errors import AnybatchError
from anybatch.lab.classify import Classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.schedule import Order, Schedule
from anybatch.lab.tasks import config_of
from anybatch.lab.training import Stopped, optimizer_of, run_key, train_run

from . import lab_fakes

STEPS = ClassifyConfig(method="bn", batch=4, epochs=5, lr=0.1, milestones=(2, 3), warmup_steps=7, warmup_start=0.25)


@pytest.mark.parametrize("mode", ["accumulate", "step"])
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_and_warm_up_are_torchs(mode: str, processes: int) -> None:
    schedule = Schedule.of(replace(STEPS, mode=mode), 100, processes)
    an_epoch = 3 * 32 // schedule.step
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1 * schedule.step / 32)
    torchs = ChainedScheduler(
        [LinearLR(optimizer, 0.25, total_iters=7), MultiStepLR(optimizer, [2 * an_epoch, 3 * an_epoch])]
    )
    for step in range(5 * an_epoch):
        assert schedule.lr(step * schedule.step) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        torchs.step()


def test_values_of_detectors_usual_schedule() -> None:
    """1x on COCO: 7,329 steps an epoch, 0.02 for 16 images, a third of it at first, all of it from step 500 on."""
    config = ClassifyConfig(
        batch=4, gradient_batch=16, lr=0.04, epochs=12, milestones=(8, 11), warmup_steps=500, warmup_start=1 / 3
    )
    schedule = Schedule.of(config, 117266, 4)
    after = {0: 0.02 / 3, 1: 0.02 * (1 / 3 + 2 / 1500), 250: 0.02 * 2 / 3, 499: 0.02 * (1499 / 1500), 500: 0.02}
    after |= {8 * 7329 - 1: 0.02, 8 * 7329: 0.002, 11 * 7329 - 1: 0.002, 11 * 7329: 0.0002, 12 * 7329 - 1: 0.0002}
    for steps, rate in after.items():
        assert schedule.lr(16 * steps) == pytest.approx(rate, rel=1e-3 if steps == 499 else 1e-9), steps


def test_warm_up_into_the_cosine() -> None:
    schedule = Schedule.of(replace(STEPS, milestones=()), 100, 1)
    for step in range(15):
        rise = min(1.0, 0.25 + 0.75 * step / 7)
        expected = 0.1 * rise * (1 + math.cos(math.pi * step / 15)) / 2
        assert schedule.lr(32 * step) == pytest.approx(expected, rel=1e-9)


def test_the_optimizer_is_given_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    real = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD) -> None:
        rates.append(self.param_groups[0]["lr"])
        real(self)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    config = replace(STEPS, epochs=3, milestones=(1, 2), warmup_steps=3, warmup_start=0.4)
    train_run(Classify(config, lab_fakes.dataset()))
    assert rates == pytest.approx([0.04, 0.06, 0.1 * 0.08, 0.01, 0.001, 0.001])


def test_order_may_be_asked_ahead() -> None:
    """The next step's images are asked for before this step is done, over the end of an epoch too."""
    ahead, plain = Order(3, 10, 8), Order(3, 10, 8)
    taken = [ahead.after(images, 4) for images in (0, 4, 4, 8, 8, 12)]
    assert [t.tolist() for t in taken] == [plain.after(images, 4).tolist() for images in (0, 4, 4, 8, 8, 12)]
    assert sorted(torch.cat([taken[0], taken[1]]).tolist()) != sorted(torch.cat([taken[3], taken[5]]).tolist())


def test_the_next_step_is_announced() -> None:
    class Told(Classify):
        told: list[tuple[list[int], int]]
        asked: list[tuple[list[int], int]]

        def expect(self, indices: torch.Tensor, seen: int) -> None:
            self.told.append((indices.tolist(), seen))

        def batch(self, indices: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.asked.append((indices.tolist(), seen))
            return super().batch(indices, seen)

    task = Told(replace(STEPS, epochs=3, milestones=()), lab_fakes.dataset())
    task.told, task.asked = [], []
    train_run(task)
    assert len(task.asked) == 6
    assert task.told == task.asked[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"milestones": (3, 2)}, r"milestones are \(3, 2\) in a run of 5 epochs: give them in ascending order"),
        ({"milestones": (2, 2)}, "in ascending order"),
        ({"milestones": (0,)}, "each within the run, or train for more epochs"),
        ({"milestones": (5,)}, "each within the run"),
        ({"warmup_steps": -1}, "warmup_steps is -1: give at least 0"),
        ({"clip": 0.0}, "clip is 0.0: give a number above 0"),
        ({"warmup_start": 0}, "warmup_start is 0: give a share of the rate, above 0 and at most 1"),
        ({"warmup_start": 1.5}, "warmup_start is 1.5"),
    ],
)
def test_schedules_that_are_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(AnybatchError, match=message):
        replace(STEPS, **change)


def test_schedules_count_in_the_key_where_they_are_used() -> None:
    plain = replace(STEPS, milestones=(), warmup_steps=0)
    assert not {"milestones", "warmup_steps", "warmup_start", "clip"} & set(plain.facts())
    data = lab_fakes.dataset()
    changed = [
        {"milestones": (2,)},
        {"milestones": (3,)},
        {"warmup_steps": 5},
        {"clip": 3.0},
        {"warmup_steps": 5, "warmup_start": 0.5},
    ]
    keys = {run_key(Classify(replace(plain, **change), data)) for change in changed}
    assert len(keys | {run_key(Classify(plain, data))}) == 6
    assert run_key(Classify(plain, data)) == run_key(Classify(replace(plain, warmup_start=0.5), data))


def test_a_configuration_comes_back_from_json() -> None:
    back = config_of(json.loads(json.dumps(STEPS.record())))
    assert back == STEPS
    assert hash(back) == hash(STEPS)


def test_a_checkpoint_from_before_there_were_schedules_goes_on(tmp_path: Path) -> None:
    config, data = replace(STEPS, epochs=2, milestones=(), warmup_steps=0, warmup_start=0.001), lab_fakes.dataset()
    with pytest.raises(Stopped):
        train_run(Classify(config, data), checkpoint=tmp_path, stop=lambda: True)
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    for name in ("task", "milestones", "warmup_steps", "warmup_start"):
        del saved["config"][name]
    torch.save(saved, tmp_path / "training.pt")
    stepped = replace(config, milestones=(1,))
    with pytest.raises(AnybatchError, match=r"was trained with milestones=\(\), not \(1,\)"):
        train_run(Classify(stepped, data), checkpoint=tmp_path, resume=True)
    assert train_run(Classify(config, data), checkpoint=tmp_path, resume=True).status == "finished"


def test_a_share_of_the_forwards_is_each_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of twelve epochs, whoever shares the work: a layer counts the forwards of its own process."""
    config = ClassifyConfig(
        method="cbn-paper(burn_in_steps='8/12')", batch=4, gradient_batch=16, epochs=12, mode="accumulate"
    )
    assert config.norm(117266).burn_in_steps == 8 * 7329 * 4
    for processes in (2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert config.norm(117266).burn_in_steps == 8 * 7329 * 4 // processes


def test_optimizer_is_the_configurations() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    plain = optimizer_of(model, STEPS)
    assert [(len(g["params"]), g["weight_decay"], g["momentum"]) for g in plain.param_groups] == [(4, 5e-4, 0.9)]
    apart = optimizer_of(model, replace(STEPS, norm_weight_decay=0.0))
    assert [g["weight_decay"] for g in apart.param_groups] == [5e-4, 0.0, 0.0]
