"""The harness itself: what it gives back, and that no rank's error is lost."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from .ranks import on_ranks, torchrun


def added(rank: int, world: int, offset: float) -> tuple[torch.Tensor, int]:
    t = torch.tensor(float(rank)) + offset
    dist.all_reduce(t)
    return t, dist.get_world_size()


def fails_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def warns(rank: int, world: int) -> None:
    warnings.warn("beware", stacklevel=1)


def dies(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def waits(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(60)


def waits_for_the_other(rank: int, world: int) -> None:
    if rank == 0:
        dist.barrier()


def test_results_by_rank() -> None:
    for world in (2, 4, 2):
        results = on_ranks(world, added, 0.5)
        assert [(float(t), n) for t, n in results] == [(sum(range(world)) + world * 0.5, world)] * world


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fails_on_one, r"rank 1:.*ValueError: only here"),
        (warns, r"UserWarning: beware"),
        (dies, r"rank 1: its process died"),
        (waits, r"rank \[0\]: no answer in 5 s"),
        (waits_for_the_other, r"rank 0:.*dist\.barrier"),
    ],
)
def test_a_rank_that_fails(function, said: str) -> None:
    on_ranks(2, added, 0.0)  # the ranks are up, so that the limit is the function's
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        on_ranks(2, function, limit=5)
    assert len(on_ranks(2, added, 0.0)) == 2  # and the next test has its ranks


def test_torchrun_runs_a_script() -> None:
    # One write a rank, so that their lines do not mix.
    line = "' '.join([os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], *sys.argv[1:]]) + '\\n'"
    script = f"import os, sys\nos.write(1, ({line}).encode())\n"
    assert sorted(torchrun(2, script, "yes").split("\n"))[1:] == ["0 of 2 yes", "1 of 2 yes"]
    with pytest.raises(AssertionError, match="no such thing"):
        torchrun(2, "import sys\nsys.exit('no such thing')\n")
    with pytest.raises(AssertionError, match="longer than 3 s"):
        torchrun(2, "import time\ntime.sleep(60)\n", limit=3)
