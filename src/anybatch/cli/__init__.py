"""The command line: parsing only; the work is in `anybatch.lab`, which the commands import: --help needs none of it."""

import sys
from importlib.util import find_spec

if missing := [
    name for name in ("typer", "rich", "matplotlib", "jinja2", "numpy", "PIL", "safetensors") if not find_spec(name)
]:
    sys.stderr.write(f"Error: the command line needs {', '.join(missing)}: pip install 'anybatch[lab]'\n")
    raise SystemExit(2)

from anybatch.cli import detect as detect
from anybatch.cli import environment as environment
from anybatch.cli import export as export
from anybatch.cli import measure as measure
from anybatch.cli import segment as segment
from anybatch.cli import study as study
from anybatch.cli import train as train
from anybatch.cli.app import app as app

__all__ = ["app"]
