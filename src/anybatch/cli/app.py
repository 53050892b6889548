"""The application: what a mistake or Ctrl-C looks like, and the version."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from anybatch.errors import AnybatchError

__all__ = ["app"]


ORDER = ("compare", "train", "detect", "segment", "weigh", "export", "bench", "diagnose", "advise", "methods")


class _Commands(TyperGroup):
    """Turns what a user can mend into one line and exit code 2, and Ctrl-C into 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AnybatchError as error:
            Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted.")
            raise typer.Exit(130) from None


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
