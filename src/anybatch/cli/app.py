"""The application: what a mistake, Ctrl-C or a fault of our own looks like, and the version."""

import os
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from anybatch.errors import AnybatchError

__all__ = ["app"]


ORDER = (
    *("compare", "study", "train", "detect", "segment", "weigh", "export", "bench", "diagnose", "advise", "methods"),
    "env",
)


class _Commands(TyperGroup):
    """Turns what a user can mend into one line and exit code 2, Ctrl-C into 130, and what nobody foresaw into a block
    to report and exit code 1. With ANYBATCH_TRACEBACK=1 errors are left as they are raised.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AnybatchError as error:
            if _whole_traceback():
                raise
            _print_error(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted.")
            raise typer.Exit(130) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except Exception as error:  # usage errors and exit codes have been dealt with: this is a fault of our own
            if _whole_traceback():
                raise
            from anybatch.lab.bug_report import bug_report, out_of_memory

            if said := out_of_memory(error):
                _print_error(said)
                sys.exit(2)
            sys.stderr.write(bug_report(error, shlex.join(["anybatch", *sys.argv[1:]])) + "\n")
            sys.exit(1)


def _whole_traceback() -> bool:
    return os.environ.get("ANYBATCH_TRACEBACK", "") not in ("", "0")


def _print_error(said: str) -> None:
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(said)}", soft_wrap=True, highlight=False)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Normalization that keeps its accuracy at any batch size: the experiments.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"anybatch {version('anybatch')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Normalization that keeps its accuracy at any batch size: the experiments."""
