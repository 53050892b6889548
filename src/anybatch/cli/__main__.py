"""`python -m anybatch.cli`: as `python -m anybatch`."""

from anybatch.cli import app

app(prog_name="anybatch")
