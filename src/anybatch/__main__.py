"""`python -m anybatch`, and so `torchrun -m anybatch`: the command line."""

from anybatch.cli import app

app(prog_name="anybatch")
