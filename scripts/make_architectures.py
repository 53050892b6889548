"""Makes docs/results/architectures.md: what becomes of public architectures that are converted, trained, folded.

    python -m scripts.make_architectures                        the rows that are not there yet, then the page
    python -m scripts.make_architectures --only timm/dla34      these anew
    python -m scripts.make_architectures --sample               those that the tests examine, anew

Every row goes to architectures.jsonl beside the page as soon as it is done, so that a stopped run goes on from there;
without that file it begins anew. The page is made of those rows at the end.
"""

import argparse
import dataclasses
import importlib
import json
import time
import warnings
from difflib import get_close_matches
from pathlib import Path

import torch
from scripts.architectures.examine import Result, examine, read
from scripts.architectures.page import page
from scripts.architectures.rows import ROWS, SAMPLE, Row

from anybatch.reporting.files import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "results" / "architectures.md"


def main(arguments: list[str] | None = None) -> None:
    """Examines what is asked for, and writes the page."""
    known = {row.key: row for row in ROWS}
    parser = argparse.ArgumentParser(description="Convert public architectures and write down what became of them.")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page; the rows go beside it, as .jsonl")
    parser.add_argument("--only", nargs="+", metavar="LIBRARY/NAME", help="examine these, and these anew")
    parser.add_argument("--sample", action="store_true", help="examine those that the tests examine, and these anew")
    options = parser.parse_args(arguments)
    raw = options.out.with_suffix(".jsonl")
    done = {result.key: result for result in read(raw)} if raw.exists() else {}
    asked = [*(options.only or ()), *(SAMPLE if options.sample else ())]
    if unknown := [key for key in asked if key not in known]:
        close = ", ".join(get_close_matches(unknown[0], known, n=5, cutoff=0.3)) or next(iter(known))
        parser.error(f"no row is called {unknown[0]!r}; there are {len(known)}, such as {close}")
    todo = asked or [key for key in known if key not in done]
    for library in {known[key].library for key in todo}:
        importlib.import_module(library)  # one that is not there is no result of its rows
    torch.set_num_threads(1)
    for key in todo:
        started = time.monotonic()
        done[key] = attempt(known[key])
        verdict = done[key].error or ("holds" if done[key].holds else "DOES NOT HOLD")
        print(f"{key}: {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
        lines = [json.dumps(dataclasses.asdict(done[name])) for name in known if name in done]
        write_atomically(raw, ("\n".join(lines) + "\n").encode())
    write_atomically(options.out, page([done[key] for key in known if key in done]).encode())


def attempt(row: Row) -> Result:
    """The result of a row, also where something raised that should not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the host libraries' own code
        try:
            return examine(row)
        except Exception as error:
            return Result(row.library, row.name, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
