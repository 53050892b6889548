"""Histories in what Accelerate saves: stopped and resumed, on one process and on two, and where it says no."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import anybatch as ab
from anybatch.integrations.accelerate import History

from .lives import assert_same, training_state
from .ranks import on_ranks
from .test_accelerate import launched, loader_of
from .test_ddp import start

METHODS = ["cbn", "iebn-cbn", "accumulated"]


class Run:
    """A model, prepared, and steps that can be repeated."""

    def __init__(self, accelerator: Accelerator, name: str) -> None:
        self.accelerator, self.net = accelerator, start(name).float()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)
        ab.attach(self.net, optimizer)
        self.model, self.optimizer = accelerator.prepare(self.net, optimizer)
        accelerator.register_for_checkpointing(History(self.net))

    def train(self, world: int, rank: int, first: int, last: int) -> None:
        for x, cotangent in list(loader_of(world, torch.float32))[rank::world][first:last]:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward((self.model(x) * cotangent).sum())
                self.optimizer.step()
                self.optimizer.zero_grad()

    def state(self) -> Any:
        return training_state(self.net), self.optimizer.state_dict()["state"]


def stopped_and_resumed(rank: int, world: int, name: str, folder: str) -> None:
    with launched(rank, world) as accelerator:
        run = Run(accelerator, name)
        run.train(world, rank, 0, 2)  # a step is two
        accelerator.save_state(folder)
        run.train(world, rank, 2, 4)
        wanted = run.state()
    with launched(rank, world) as accelerator:
        run = Run(accelerator, name)
        accelerator.load_state(folder)
        run.train(world, rank, 2, 4)
        assert_same(run.state(), wanted)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_on_two_processes(name: str, tmp_path: Path) -> None:
    """Each goes on from its own history."""
    on_ranks(2, stopped_and_resumed, name, str(tmp_path))
    if name != "accumulated":
        first, second = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)["histories"]
        layer = next(iter(first["layers"]))
        mine, theirs = (next(iter(part["layers"][layer].values())) for part in (first, second))
        assert any(not torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed(name: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    run = Run(accelerator, name)
    run.train(1, 0, 0, 2)
    accelerator.save_state(tmp_path)
    run.train(1, 0, 2, 4)
    wanted = run.state()

    again = Run(accelerator, name)  # registered beside the first one, which the second accelerator would not have
    for kept in (accelerator._models, accelerator._optimizers, accelerator._custom_objects):
        del kept[0]
    accelerator.load_state(tmp_path)
    again.train(1, 0, 2, 4)
    assert_same(again.state(), wanted)


def other_processes(rank: int, world: int) -> None:
    net = start("cbn").float()
    net(next(iter(loader_of(1, torch.float32)))[0])
    state = History(net).state_dict()
    assert len(state["histories"]) == world == 2
    fresh = start("cbn").float()
    with pytest.warns(
        UserWarning, match="History: 1 process.es. saved their histories, and 2 go on: the histories are"
    ):
        History(fresh).load_state_dict({"histories": state["histories"][:1]})
    assert not any(ab.history_state_dict(fresh)["layers"].values())
    History(fresh).load_state_dict(state)
    assert all(ab.history_state_dict(fresh)["layers"].values())


def test_another_number_of_processes() -> None:
    on_ranks(2, other_processes)


def wrapped(rank: int, world: int) -> list[str]:
    return list(History(DistributedDataParallel(start("cbn").float())).state_dict()["histories"][0]["layers"])


def test_names_are_the_models_own() -> None:
    layers = list(ab.history_state_dict(start("cbn"))["layers"])
    assert on_ranks(2, wrapped) == [layers, layers]
    assert list(History(torch.compile(start("cbn"), backend="eager")).state_dict()["histories"][0]["layers"]) == layers


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "History: a NoneType is no list of histories, one a process; save the checkpoint anew"),
        ({"histories": {}}, "History: a dict is no list of histories"),
        ({"histories": [{}]}, "load_history_state_dict: not a history of version 1 \\(its version is None"),
    ],
)
def test_what_is_no_history(state: dict[str, Any], said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        History(start("cbn")).load_state_dict(state)


def test_of_another_conversion() -> None:
    with pytest.raises(ab.AnybatchError, match="convert the model as it was converted when the state was saved"):
        History(nn.Linear(2, 2)).load_state_dict(History(start("cbn")).state_dict())


def test_the_scaler_of_mixed_precision() -> None:
    """None without float16: what ``attach`` takes as it is."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net = start("cbn").float()
    ab.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), scaler=accelerator.scaler)
