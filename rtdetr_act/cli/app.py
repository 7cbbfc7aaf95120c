"""The application that commands register with, and the options and errors that all of them share."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from rtdetr_act.errors import Interrupted
from rtdetr_act.integrations.ultralytics.downloads import ALLOW_CODE, ALLOW_CODE_FLAG
from rtdetr_act.version import __version__


class _Commands(TyperGroup):
    """Command group in which Ctrl-C and an OSError, such as that of a full disk, are errors of one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; the files that were there are as they were") from None
        except OSError as error:
            from rtdetr_act.integrations.ultralytics.failures import translate

            if (translated := translate(error)) is None:
                raise
            raise translated from error


app = typer.Typer(
    cls=_Commands,
    name="rtdetr-act",
    help="Swap the activation functions of Ultralytics RT-DETR and YOLO, and see whether the swap pays.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
    allow_download_code: bool = typer.Option(
        False, ALLOW_CODE_FLAG, help="Run the code that a data set's YAML has under 'download:', if images are missing."
    ),
) -> None:
    if allow_download_code:
        os.environ[ALLOW_CODE] = "1"
