"""What the command line says of an error that nobody foresaw: one block of lines to copy into a report."""

import platform
import traceback

import torch

from anybatch.lab import machine

__all__ = ["bug_report", "in_one_line", "out_of_memory"]

FRAMES = 6  # of the innermost: enough to see who called whom, few enough to copy
RULE = "-" * 72


def bug_report(error: Exception, command: str) -> str:
    """The error, the request to report it, and between two rules what the report needs.

    Args:
        error: as it was caught.
        command: the line that led to it.
    """
    versions, commit = machine.versions(), machine.commit()
    own = f"anybatch {versions['anybatch']}" + (f" ({commit})" if commit else "")
    facts = f"{own}, torch {versions['torch']}, Python {versions['python']}, {platform.platform(terse=True)}"
    frames = "".join(traceback.format_exception(error, limit=-FRAMES)).rstrip()
    return (
        f"Error: {in_one_line(error)}\n"
        "anybatch did not expect this: please report it in the issue tracker of the project,\n"
        "with the lines between the rules and what 'anybatch env' prints. ANYBATCH_TRACEBACK=1 shows every frame.\n"
        f"{RULE}\n$ {command}\n{facts}\n{frames}\n{RULE}"
    )


def in_one_line(error: Exception) -> str:
    """Class and message of an error that nobody foresaw, and where it was raised."""
    said = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if said else ''}{said}{place}"


def out_of_memory(error: Exception) -> str | None:
    """What to say where memory is all that was missing, which is no fault of anybatch's; None for other errors."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    return "out of memory: take a smaller --batch, smaller images or fewer --jobs, or another --device"
