"""Times every method that passes the gate, side by side."""

import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.bench.config import REFERENCE, BenchConfig, Row
from anybatch.lab.bench.gate import STEPS, wrong
from anybatch.lab.bench.records import Outcome, Timing
from anybatch.lab.bench.subjects import WARM_UP, Subject, batches_of, subject
from anybatch.lab.bench.synced import SyncBN, process_group
from anybatch.lab.bench.traffic import copy_bandwidth, measure, wait
from anybatch.lab.released import Released

__all__ = ["bench"]

LEAST = 0.02  # seconds that a method's turn in a round takes, in as many steps: what preempts takes milliseconds


def bench(config: BenchConfig, progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Times every method that passes the gate, in the order of ``config.rows()``; then measures its memory.

    Args:
        config: what to time.
        progress: called with the steps done and their total, gates and warm-ups included.

    Raises:
        AnybatchError: a method is unknown, or the reference does not pass the gate.
    """
    machine.check_device(config.device)
    norms = {row: config.norm(row.method) for row in config.rows()}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with ExitStack() as stack:
            if config.device.startswith("cuda") and any(isinstance(norm, SyncBN) for norm in norms.values()):
                stack.enter_context(process_group(config.device))
            return _bench(config, norms, progress or (lambda *_: None))
    finally:
        torch.set_num_threads(threads)


def _bench(config: BenchConfig, norms: dict[Row, Any], progress: Callable[[int, int], None]) -> Outcome:
    batches = batches_of(config)
    refused: dict[Row, tuple[str, bool]] = {}
    ready: dict[Row, Subject] = {}
    # A method whose steps are of several kinds in turn takes all of them in its turn.
    period = math.lcm(*(getattr(norm, "refresh", 1) for norm in norms.values()))
    warm_up = {row: period * math.ceil(_warm_up(norm) / period) for row, norm in norms.items()}
    before = {row: 2 * STEPS + steps for row, steps in warm_up.items()}
    done, total = 0, sum(before.values()) + config.rounds * len(norms)
    for row in norms:
        try:
            steps = subject(config, row, batches)
            if reason := wrong(config, row, steps, batches):
                refused[row] = reason, True
            else:
                for _ in range(warm_up[row]):
                    steps()
                ready[row] = steps
        # AnybatchError, torch's for a single value a channel; its compiler's, and memory that is not there
        except (ValueError, RuntimeError) as error:
            refused[row] = str(error).strip().partition("\n")[0], False
        done += before[row]
        progress(done, total)
    reference = Row(REFERENCE)
    if reference not in ready:
        raise AnybatchError(
            f"BatchNorm itself does not pass: {refused[reference][0]}; try another --device, --batch or --dtype"
        )
    seconds: dict[Row, list[float]] = {row: [] for row in ready}
    once = median(_time(ready[reference], config.device, 1) for _ in range(WARM_UP))
    repeats = period * max(1, math.ceil(LEAST / once / period))
    order, shuffle = list(ready), random.Random(0).shuffle
    for number in range(config.rounds):
        shuffle(order)
        for row in order:
            seconds[row].append(_time(ready[row], config.device, repeats))
        progress(total - (config.rounds - 1 - number) * len(norms), total)
    timings = []
    for row, norm in norms.items():
        if row in refused:
            reason, failed = refused[row]
            timings.append(Timing(row, repr(norm), refused=reason, failed=failed))
        else:
            ratios = tuple(a / b for a, b in zip(seconds[row], seconds[reference], strict=True))
            timings.append(Timing(row, repr(norm), tuple(seconds[row]), ratios, measure(ready[row], period)))
    return Outcome(config, tuple(timings), repeats, copy_bandwidth(config.device))


def _warm_up(norm: Any) -> int:
    """Steps before any is timed: the authors' lists grow until they hold the window."""
    return max(WARM_UP, norm.window) if isinstance(norm, Released) else WARM_UP


def _time(steps: Subject, device: str, repeats: int) -> float:
    """Seconds of one, the mean of so many in a row."""
    taken = 0.0
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        steps.timed()
        wait(device)
        taken += time.perf_counter() - started
        steps.between()
    return taken / repeats
