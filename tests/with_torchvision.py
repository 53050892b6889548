"""The command line beside a torchvision whose operators do not load: `python -m tests.with_torchvision detect ...`.

The processes that it starts import this module again, and so have the operators too; torchrun takes it likewise:
`torchrun --nproc-per-node 2 -m tests.with_torchvision detect ...`.
"""

from tests.torchvision_operators import declare

declare()

if __name__ == "__main__":
    import sys

    from anybatch.cli import app

    sys.argv[0] = "anybatch"
    app()
