"""What a bug report has to say of the machine: versions, devices, threads, and the libraries beside torch."""

import os
import re
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from anybatch.lab import machine

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """The lines of a bug report, by what they are about; imports nothing but torch."""
    versions, facts, commit = machine.versions(), machine.machine(), machine.commit()
    there, missing = _libraries()
    return {
        "anybatch": versions["anybatch"] + (f" (commit {commit})" if commit else ""),
        "torch": versions["torch"],
        "python": versions["python"],
        "platform": str(facts["platform"]),
        "processor": f"{facts['cpu']}, {facts['cores']} cores",
        "devices": ", ".join(_devices()),
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})",
        "libraries": ", ".join(there) or "none",
        "not installed": ", ".join(missing) or "none",
    }


def _devices() -> list[str]:
    """The processor, and every accelerator that torch can use, by its name where it has one."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ["cpu"]
    names = getattr(torch.get_device_module(kind), "get_device_name", None)
    count = torch.accelerator.device_count()
    return ["cpu", *(f"{kind.type}:{i}" + (f" {names(i)}" if names else "") for i in range(count))]


def _libraries() -> tuple[list[str], list[str]]:
    """What the extras of this package name, the tools of its developers left out: installed with versions, and not."""
    try:
        lines = requires("anybatch") or []
    except PackageNotFoundError:  # a source tree that is not installed says nothing of its extras
        lines = []
    asked = [line for line in lines if not re.search(r"""extra == ['"](dev|docs)['"]""", line)]
    names = dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked)
    there, missing = [], []
    for name in names:
        if name in ("anybatch", "torch"):
            continue
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return there, missing
