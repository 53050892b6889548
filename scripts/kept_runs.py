"""Runs of an experiment that are kept in a file, one JSON line each, and not made twice."""

import argparse
import json
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from anybatch.reporting.files import write_atomically

__all__ = ["add_options", "make_runs"]


def add_options(parser: argparse.ArgumentParser, seeds: int, out: str) -> None:
    """How many runs, of how many epochs, and where they go."""
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(out))


def make_runs(
    run: Callable[[str, int, int], dict[str, Any]], names: Sequence[str], asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Make what is missing, seed by seed, and give all runs of so many epochs.

    Args:
        run: of a name, a seed and a number of epochs; its record has all three.
        names: of the experiments.
        asked: by the options of :func:`add_options`.
    """
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    runs = [json.loads(line) for line in lines]
    done = {(each["name"], each["seed"], each["epochs"]) for each in runs}
    todo = [(run, name, seed, asked.epochs) for seed in range(asked.seeds) for name in names]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(asked.jobs) as pool:
        for found in pool.imap_unordered(_call, [each for each in todo if each[1:] not in done]):
            runs.append(found)
            write_atomically(asked.out, "".join(json.dumps(each) + "\n" for each in runs).encode())
            print(found["name"], found["seed"], found["accuracy"], flush=True)
    return [each for each in runs if each["epochs"] == asked.epochs]


def _call(asked: tuple[Callable[[str, int, int], dict[str, Any]], str, int, int]) -> dict[str, Any]:
    run, *rest = asked
    return run(*rest)
