"""The command that runs a script of another repository: exec."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Act, ActLr, From, Init, Memory, ScopeOption
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError
from rtdetr_act.surgery.plan import check_init, check_memory, check_scope

if TYPE_CHECKING:
    from rtdetr_act.integrations.yolov5.trained import Trained

_show_warning = warnings.showwarning  # the command line counts warnings later on, but those of a script are its own


@command(
    "act=arelu yolov5/train.py --data coco128.yaml --img 640",
    "yolov7/test.py --data coco.yaml --weights best.pt",
    name="exec",
)
def run(
    script: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]… SCRIPT [WORD]…", show_default=False)
    ] = None,
    act: Act = None,
    replaces: From = None,
    scope: ScopeOption = "conv",
    init: Init = "paper",
    act_lr: ActLr = 1.0,
    memory: Memory = None,
) -> None:
    """Run a script of YOLOv5 or YOLOv7 with other activations.

    It runs as 'python SCRIPT' does, and every word after it is its own. Its models have the activations of their YAML,
    a fifth item per row included, or of their checkpoint, and those of act=.
    """
    from rtdetr_act.workflows.script import run_script

    if not script:
        raise InputError("exec needs a script: rtdetr-act exec act=arelu yolov5/train.py --data coco128.yaml")
    if act is None and (replaces, scope, init, act_lr) != (None, "conv", "paper", 1.0):
        raise InputError("from, scope, init and act_lr say how an activation is swapped in: name one with act=")
    path, *words = script
    warnings.showwarning = _show_warning
    try:
        run_script(
            path,
            words,
            act,
            show=_print_trained,
            scope=check_scope(scope),
            init=check_init(init),
            act_lr=act_lr,
            replaces=replaces,
            memory=check_memory(memory),
        )
    except RtdetrActError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"{Path(path).name} was interrupted") from None
    except Exception as error:
        error = error.with_traceback(_start_at(path, error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def _print_trained(trained: Trained) -> None:
    from rtdetr_act.integrations.yolov5.messages import say

    for line in str(trained).splitlines():
        say(line)


def _start_at(script: str, trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the frame of a script on; None if it has none, as for a syntax error in it."""
    while trace is not None and trace.tb_frame.f_code.co_filename != str(Path(script).absolute()):
        trace = trace.tb_next
    return trace
