"""The command line: `rtdetr-act`. Commands parse, call and print; torch is imported when one of them runs."""

from __future__ import annotations

import sys

import typer

from rtdetr_act import __version__
from rtdetr_act.errors import RtdetrActError

app = typer.Typer(
    name="rtdetr-act",
    help="Swap the activation functions of Ultralytics RT-DETR and YOLO, and see whether the swap pays.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and a non-zero exit."""
    # They register their commands.
    from rtdetr_act.cli import deploying, diagnosing, looking, running, searching, studying  # noqa: F401

    try:
        app()
    except RtdetrActError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
