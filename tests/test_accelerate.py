"""The ordinary loop with Hugging Face's Accelerate on two processes, beside the same written by hand."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab

from .lives import training_state
from .ranks import on_ranks
from .test_contract import converted
from .test_ddp import CONFIGS, ByHand, start
from .tolerances import ORACLE, REORDERED

D = torch.float64
# Per rank five batches: two steps of two and, since the loader ends there, one of one.
BATCHES, PER_STEP = 5, 2


@contextlib.contextmanager
def launched(rank: int, world: int, **options: Any) -> Iterator[Accelerator]:
    """An accelerator as torchrun starts one; nothing of it stays."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in env.items()}):
        try:
            yield Accelerator(cpu=True, gradient_accumulation_steps=PER_STEP, **options)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def loader_of(world: int, dtype: torch.dtype) -> DataLoader:
    """Images and cotangents."""
    g = torch.Generator().manual_seed(3)
    n = 2 * BATCHES * world
    images, cotangents = torch.randn(n, 3, 9, 7, generator=g), torch.randn(n, 8, 4, 3, generator=g)
    return DataLoader(TensorDataset(images.to(dtype), cotangents.to(dtype)), batch_size=2)


def accelerated(accelerator: Accelerator, net: nn.Module, loader: DataLoader) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    ab.attach(net, optimizer)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    for x, cotangent in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) * cotangent).sum())
            optimizer.step()
            optimizer.zero_grad()
    return training_state(net)


def by_hand(net: nn.Module, batches: list[tuple[Tensor, Tensor]], autocast: bool = False) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    ab.attach(net, optimizer)
    model = ByHand(net)
    for i, (x, cotangent) in enumerate(batches, start=1):
        steps = i % PER_STEP == 0 or i == len(batches)
        with contextlib.nullcontext() if steps else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(x)
            ((out.to(cotangent.dtype) * cotangent).sum() / PER_STEP).backward()
        if steps:
            model.average()
            optimizer.step()
            optimizer.zero_grad()
    return training_state(net)


def beside(rank: int, world: int, name: str) -> None:
    with launched(rank, world) as accelerator:
        got = accelerated(accelerator, start(name), loader_of(world, D))
    wanted = by_hand(start(name), list(loader_of(world, D))[rank::world])
    torch.testing.assert_close(got, wanted, **ORACLE)


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulation_is_what_it_is_by_hand(name: str) -> None:
    on_ranks(2, beside, name)


def in_bfloat16(rank: int, world: int, name: str) -> None:
    nets = [start(name).float() for _ in range(2)]
    with launched(rank, world, mixed_precision="bf16") as accelerator:
        got = accelerated(accelerator, nets[0], loader_of(world, torch.float32))
    wanted = by_hand(nets[1], list(loader_of(world, torch.float32))[rank::world], autocast=True)
    torch.testing.assert_close(got, wanted, **REORDERED)


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_precision_is_what_it_is_by_hand(name: str) -> None:
    on_ranks(2, in_bfloat16, name)


def attached(rank: int, world: int) -> int:
    """Accumulated batches that a layer counted in two, of two forwards each."""
    net = converted("accumulated")
    with launched(rank, world) as accelerator:
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.02))
        ab.attach(net, optimizer)
        for x, _ in list(loader_of(world, torch.float32))[:4]:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    return int(net.bn1.num_batches_tracked)


def test_attach_takes_the_prepared_optimizer() -> None:
    assert on_ranks(2, attached) == [2, 2]
