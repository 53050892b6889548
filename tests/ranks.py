"""Real processes for tests of several ranks: gloo on CPU, started once a session and used again by every test."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Forked from a server that has imported torch, and no more: a rank starts in milliseconds, without the test's threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "anybatch"])
_pool: list[tuple[Any, Any]] = []  # processes and the connections to them


def on_ranks(world: int, function: Callable[..., Any], *args: Any, limit: float = 60) -> list[Any]:
    """What ``function(rank, world, *args)`` returns on each of ``world`` processes of a new gloo group.

    Args:
        world: processes; rank 0 first in what comes back.
        function: of a module's top level; runs after ``torch.manual_seed(0)`` on one thread, warnings are errors.
        args: anything that pickles, as what the function returns.
        limit: seconds; a collective waits half of that, so that a rank that hangs in one says where.

    An AssertionError if a rank raised (its traceback is the message), died or took longer than ``limit``.
    """
    while len(_pool) < world:
        ours, theirs = _context.Pipe()
        _pool.append((_context.Process(target=_serve, args=(theirs,), daemon=True), ours))
        _pool[-1][0].start()
        theirs.close()
    with tempfile.TemporaryDirectory() as folder:
        ranks = {connection: rank for rank, (_, connection) in enumerate(_pool[:world])}
        try:
            for connection, rank in ranks.items():
                connection.send_bytes(pickle.dumps((function, rank, world, args, f"{folder}/store", limit / 2)))
            return _gather(ranks, limit)
        except BaseException:  # whatever the ranks do now, no other test meets it
            while _pool:
                process, connection = _pool.pop()
                process.kill()
                connection.close()
            raise


def _gather(ranks: dict[Any, int], limit: float) -> list[Any]:
    results, failures, end = [None] * len(ranks), [], time.monotonic() + limit
    while ranks and (ready := wait(list(ranks), max(0.0, end - time.monotonic()))):
        for connection in ready:
            rank = ranks.pop(connection)
            try:
                results[rank], error = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                error = "its process died"
            if error:
                failures.append(f"rank {rank}: {error}")
                end = min(end, time.monotonic() + 2)  # time for the others to report
    if ranks:
        failures.append(f"rank {sorted(ranks.values())}: no answer" + ("" if failures else f" in {limit} s"))
    assert not failures, "\n".join(failures)
    return results


def _serve(connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test session's, which ends the ranks
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the session is over
        while task := connection.recv_bytes():
            try:
                answer = pickle.dumps((_run(task), None))
            except BaseException:
                answer = pickle.dumps((None, traceback.format_exc()))
            connection.send_bytes(answer)


def _run(task: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function, rank, world, args, store, patience = pickle.loads(task)
        wait_for = timedelta(seconds=patience)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=wait_for)
        try:
            torch.manual_seed(0)
            return function(rank, world, *args)
        finally:
            dist.destroy_process_group()  # its subgroups too


def torchrun(processes: int, script: str, *args: str, limit: float = 120) -> str:
    """What ``script``, a module's name or source of several lines, prints under the real torchrun, all ranks together.

    An AssertionError with that output if it fails or takes longer than ``limit`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(source := f"{folder}/script.py").write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [*([source] if "\n" in script else ["-m", script]), *args]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=os.environ | env, **pipe) as process:
            try:
                output = process.communicate(timeout=limit)[0]
            except subprocess.TimeoutExpired:
                process.terminate()  # and torchrun ends its ranks
                output = f"torchrun took longer than {limit} s:\n{process.communicate()[0]}"
    assert process.returncode == 0, output
    return output
