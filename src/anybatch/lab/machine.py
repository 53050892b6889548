"""What a measurement was taken with: machine, versions, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from anybatch.errors import AnybatchError

__all__ = ["anybatch_version", "check_device", "commit", "cores", "is_source_of", "machine", "versions"]


def anybatch_version() -> str:
    """The installed version; "unknown" where the package runs without being installed."""
    try:
        return version("anybatch")
    except PackageNotFoundError:
        return "unknown"


def check_device(device: str) -> None:
    """Raises AnybatchError unless tensors can be made on `device`."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise AnybatchError(f"device '{device}' cannot be used ({reason}): use cpu, or one that is there") from error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Processor, cores this process may use, operating system, and the accelerator if `device` is one."""
    facts: dict[str, str | int] = {"cpu": _cpu_name(), "cores": cores(), "platform": platform.platform(terse=True)}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Versions of Python, torch and anybatch."""
    return {"python": platform.python_version(), "torch": torch.__version__, "anybatch": anybatch_version()}


@cache
def commit() -> str | None:
    """The commit this source runs from ("-dirty" if edited since), or None outside a checkout of anybatch."""
    folder = Path(__file__).parent
    # An installed copy may lie inside somebody else's repository: only a tracked file speaks for this one.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


@cache
def is_source_of(commit: str) -> bool:
    """Whether this package, edits included, is as it was at `commit`; False where that cannot be known."""
    folder = Path(__file__).parents[1]
    return _git(folder, "diff", "--quiet", commit, "--", str(folder)) is not None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
