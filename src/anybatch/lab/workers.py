"""Runs spread over worker processes, one thread each; what happens comes back as a stream of events."""

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import nn

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.bug_report import in_one_line, out_of_memory
from anybatch.lab.config import TrainConfig
from anybatch.lab.interruption import Interruption
from anybatch.lab.pictures import save
from anybatch.lab.tasks import open_task
from anybatch.lab.training import Progress, RunResult, run_key, train_run

__all__ = ["Advanced", "Event", "Failed", "Finished", "Started", "jobs_for", "run_all"]

REPORT_EVERY = 0.25  # seconds


def jobs_for(device: str) -> int:
    """Runs at a time where nobody says: one a core, on a GPU one."""
    return machine.cores() if device == "cpu" else 1


@dataclass(frozen=True)
class Started:
    """A worker took the run."""

    config: TrainConfig


@dataclass(frozen=True)
class Advanced:
    """The run has come this far."""

    config: TrainConfig
    progress: Progress


@dataclass(frozen=True)
class Finished:
    """The run is done."""

    config: TrainConfig
    result: RunResult


@dataclass(frozen=True)
class Failed:
    """The run ended with an error, or its process was killed."""

    config: TrainConfig
    reason: str


Event = Started | Advanced | Finished | Failed


def run_all(configs: Sequence[TrainConfig], jobs: int, pictures: Path | None = None) -> Generator[Event]:
    """Runs `configs` in their order, `jobs` at a time. Closing the iterator stops the workers.

    Args:
        configs: what to run.
        jobs: how many processes.
        pictures: where each run leaves its pictures, in a folder named by its key; None makes none.
    """
    waiting = deque(configs)
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(jobs, len(configs))):
            worker = _Worker(pictures)
            workers[worker.connection] = worker
            yield worker.give(waiting.popleft())
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                event = worker.receive()
                yield event
                if isinstance(event, Advanced | Started):
                    continue
                if worker.died:
                    del workers[connection]
                    if waiting:
                        worker = _Worker(pictures)
                        workers[worker.connection] = worker
                if waiting:
                    yield worker.give(waiting.popleft())
                elif not worker.died:
                    worker.stop()
                    del workers[connection]
    finally:
        for worker in workers.values():
            worker.kill()


class _Worker:
    """One process and what it is doing."""

    def __init__(self, pictures: Path | None) -> None:
        # Spawned, not forked: torch's threads and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, pictures), daemon=True)
        with Interruption() as interruption, _ctrl_c_blocked():
            self.process.start()  # interrupted in mid-start it would leave a process that waits for its orders
        theirs.close()
        if interruption.signal is not None:
            signal.raise_signal(interruption.signal)
        self.died = False
        self.config: TrainConfig | None = None

    def give(self, config: TrainConfig) -> Started:
        self.config = config
        with contextlib.suppress(BrokenPipeError):  # it has died: `receive` will say so
            self.connection.send(config)
        return Started(config)

    def receive(self) -> Event:
        try:
            event: Event = self.connection.recv()
        except (EOFError, ConnectionResetError):
            assert self.config is not None
            self.died = True
            self.process.join()
            self.connection.close()
            return Failed(self.config, f"its process ended with exit code {self.process.exitcode} (out of memory?)")
        return event

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)
        self.connection.close()

    def kill(self) -> None:
        self.process.terminate()
        self.process.join(5)
        self.connection.close()


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """A process that is started here inherits the mask, and so prints no traceback while it imports; see `_work`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which the first start does otherwise, and lets Ctrl-C through after
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, pictures: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone: so is the work
        while (config := connection.recv()) is not None:
            connection.send(_run(config, connection, pictures))


def _run(config: TrainConfig, connection: Connection, pictures: Path | None) -> Event:
    reported = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal reported
        if time.monotonic() - reported >= REPORT_EVERY:
            reported = time.monotonic()
            connection.send(Advanced(config, progress))

    try:
        task = open_task(config)

        def finish(model: nn.Module) -> None:
            if pictures is not None:
                save(task, model, pictures / run_key(task))

        return Finished(config, train_run(task, report, finish=finish))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except AnybatchError as error:
        return Failed(config, str(error))
    except Exception as error:  # whatever a run meets, the others go on
        return Failed(config, out_of_memory(error) or in_one_line(error))
