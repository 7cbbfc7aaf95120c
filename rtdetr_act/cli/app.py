"""The application that commands register with, and the options and errors that all of them share."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from rtdetr_act.errors import InputError, Interrupted, quote, suggest
from rtdetr_act.integrations.ultralytics.downloads import ALLOW_CODE, ALLOW_CODE_FLAG
from rtdetr_act.version import __version__

_TASKS = ("detect", "segment", "classify", "pose", "obb", "semantic")  # first words of the `yolo` command


class _Commands(TyperGroup):
    """Command group whose errors are one sentence: wrong words, Ctrl-C, and an OSError such as that of a full disk."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not ctx.resilient_parsing and args[0] not in self.commands:
            if args[0] in _TASKS:
                raise InputError(f"leave {quote(args[0])} out: the model tells its task")
            known = list(self.commands)
            raise InputError(
                f"there is no command {quote(args[0])}{suggest(args[0], known) or ': there are ' + ', '.join(known)}"
            )
        return super().resolve_command(ctx, args)

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
        except Exception as error:
            # Click's error of a wrong value. Typer brings its own copy of Click in some releases.
            message = getattr(error, "format_message", str)()
            if not message:
                raise
            raise InputError(message[0].lower() + message[1:].rstrip(".")) from None


app = typer.Typer(
    cls=_Commands,
    name="rtdetr-act",
    help="Swap the activation functions of Ultralytics RT-DETR and YOLO, and see whether the swap pays.",
    epilog="""\b
Examples:
  rtdetr-act train best.pt act=arelu init=match data=my.yaml epochs=50
  rtdetr-act COMMAND --help""",
    no_args_is_help=True,
    rich_markup_mode=None,
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
