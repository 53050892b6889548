"""Recalibration over several processes: the moments of all data, and an error on one rank on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import anybatch as ab

from .ranks import on_ranks
from .test_contract import converted
from .tolerances import ORACLE, SAME

BATCHES = [3, 1, 4, 2, 2]  # examples of each batch there is
OWNERS = {2: [0, 0, 0, 1, 0], 4: [0, 3, 3, 0, 1]}  # the rank that gets it; of four, rank 2 gets none


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 9, 7, generator=generator, dtype=dtype) * (i + 1) + 5 for i, n in enumerate(BATCHES)]


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(2)
    return converted(name, dtype=dtype)


def share(rank: int, world: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x for x, owner in zip(batches(dtype), OWNERS[world], strict=True) if owner == rank]


def recalibrated(rank: int, world: int, names: list[str]) -> list[tuple[int, dict[str, Tensor]]]:
    results = []
    for name in names:
        model = model_of(name)
        results.append((ab.recalibrate_(model, share(rank, world)), model.state_dict()))
    return results


WITH_RUNNING = [name for name in ab.METHODS if name not in ("gn", "proxynorm", "proxynorm-group", "nonorm")]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_the_moments_of_all_data(world: int) -> None:
    """Equal on all ranks bit for bit; to float64 rounding those of one process that has every batch."""
    by_rank = on_ranks(world, recalibrated, WITH_RUNNING)
    for i, name in enumerate(WITH_RUNNING):
        alone = model_of(name)
        assert ab.recalibrate_(alone, batches()) == sum(BATCHES)
        for results in by_rank:
            examples, state = results[i]
            assert examples == sum(BATCHES)
            torch.testing.assert_close(state, by_rank[0][i][1], rtol=0, atol=0)
            torch.testing.assert_close(state, alone.state_dict(), **ORACLE)


def far_from_zero(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of 1e4 with a small spread between the ranks."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    data = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) + 1e4 for n in (7, 40)]
    ab.recalibrate_(model, data[rank].split(8))
    return model[0].running_mean, model[0].running_var, torch.cat(data)


def test_at_a_mean_of_1e4() -> None:
    for mean, var, data in on_ranks(2, far_from_zero):
        torch.testing.assert_close(mean.double(), data.double().mean(0), **SAME)
        torch.testing.assert_close(var.double(), data.double().var(0, correction=0), **SAME)


def raising(rank: int, world: int, where: str) -> tuple[str, str, bool]:
    model = model_of("cbn")
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def loader():
        yield torch.randn(2, 3, 9, 7, dtype=torch.float64) * (torch.inf if rank == 1 and where == "data" else 1.0)
        if rank == 1 and where == "loader":
            raise OSError("no such image")

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x if rank != 1 or where != "model" else x.flatten())

    try:
        ab.recalibrate_(model, None if rank == 1 and where == "no loader" else loader(), forward=forward)
    except Exception as error:
        unchanged = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        return type(error).__name__, str(error), unchanged and model.training
    return "", "", False


@pytest.mark.parametrize(
    ("where", "kind", "said"),
    [
        ("loader", "OSError", "no such image"),
        ("model", "RuntimeError", "Expected 3D"),
        ("data", "AnybatchError", "'bn1' met moments that are not finite"),
        ("no loader", "AnybatchError", "yields batches"),
    ],
)
def test_an_error_on_one_rank_is_one_on_every_rank(where: str, kind: str, said: str) -> None:
    (other, told, other_unchanged), (own, message, unchanged) = on_ranks(2, raising, where)
    assert own == kind
    assert said in message
    assert other == "AnybatchError"
    assert told == f"recalibrate_: rank 1 raised {kind}: {message}"
    assert unchanged
    assert other_unchanged


def with_nothing(rank: int, world: int) -> str:
    with pytest.raises(ab.AnybatchError) as error:
        ab.recalibrate_(model_of("bn"), [])
    return str(error.value)


def test_no_batch_on_any_rank() -> None:
    assert all("the loader gave no batch" in said for said in on_ranks(2, with_nothing))


def in_parts(rank: int, world: int) -> list[Tensor]:
    """Alone, in a group of two, and refused in the group of the others."""
    alone, paired = model_of("cbn"), model_of("cbn")
    if rank == 0:  # no one else calls
        ab.recalibrate_(alone, batches()[:1], sync=False)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ab.recalibrate_(paired, batches()[rank : rank + 1], process_group=groups[rank // 2])
    with pytest.raises(ab.AnybatchError, match=f"rank {rank} is not in process_group"):
        ab.recalibrate_(paired, batches(), process_group=groups[1 - rank // 2])
    if rank == 3:
        with pytest.raises(OSError, match="here"):
            ab.recalibrate_(paired, batches(), process_group=groups[1], forward=fail)
    elif rank == 2:
        with pytest.raises(ab.AnybatchError, match="rank 3 raised OSError: here"):
            ab.recalibrate_(paired, [], process_group=groups[1])
    return [model.bn1.running_mean for model in (alone, paired)]


def fail(*_: object) -> None:
    raise OSError("here")


def test_on_one_rank_and_in_a_group() -> None:
    results = on_ranks(4, in_parts)
    for i, (alone, paired) in enumerate(results):
        for got, used in ((alone, batches()[: i == 0]), (paired, batches()[i // 2 * 2 :][:2])):
            model = model_of("cbn")
            if used:
                ab.recalibrate_(model, used)
            torch.testing.assert_close(got, model.bn1.running_mean, **ORACLE)


def wrapped(rank: int, world: int) -> tuple[dict[str, Tensor], bool]:
    """Trained a step, recalibrated with unequal loaders, trained on."""
    model = model_of("cbn")
    ddp = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        out = ddp(torch.randn(2, 3, 9, 7, dtype=torch.float64, generator=generator))
        out.backward(torch.randn(out.shape, dtype=out.dtype, generator=generator))

    step()
    ab.recalibrate_(ddp, share(rank, world))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    step()
    return state, ddp.training and model.training


def test_under_distributed_data_parallel() -> None:
    alone = model_of("cbn")
    ab.recalibrate_(alone, batches())
    for state, training in on_ranks(4, wrapped):
        assert training
        for name, value in alone.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(state[name], value, **ORACLE)


def sharded(rank: int, world: int) -> dict[str, Tensor]:
    """FSDP2: every forward gathers weights, so the ranks have as many batches."""
    model = model_of("cbn")
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    ab.recalibrate_(model, batches()[2 * rank : 2 * rank + 2])
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_sharded_weights() -> None:
    alone = model_of("cbn")
    ab.recalibrate_(alone, batches()[:4])
    for buffers in on_ranks(2, sharded):
        torch.testing.assert_close(buffers, dict(alone.named_buffers()), **ORACLE)
