"""The command line beside a torchvision whose operators do not load: `python -m tests.with_torchvision detect ...`.

The processes that it starts import this module again, and so have the operators too; torchrun takes it likewise:
`torchrun --nproc-per-node 2 -m tests.with_torchvision detect ...`. Another module than the command line runs with them
as `python -m tests.with_torchvision -m scripts.make_architectures ...`.
"""

from tests.torchvision_operators import declare

declare()

if __name__ == "__main__":
    import runpy
    import sys

    if sys.argv[1:2] == ["-m"]:
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        from anybatch.cli import app

        sys.argv[0] = "anybatch"
        app()
