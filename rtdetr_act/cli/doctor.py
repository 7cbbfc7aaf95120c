"""The command that examines a model: doctor."""

from __future__ import annotations

import typer

from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import Model, require


@command("best.pt", "runs/detect/rtdetr-l-arelu")
def doctor(model: Model = None) -> None:
    """Examine whether an activation is really in a model.

    What stands at the sites, whether training keeps it, what it learned, and what the file does without rtdetr-act. The
    model is a checkpoint, a model YAML, or a run folder, whose best.pt is examined; nothing is written. The exit code
    is 0 if nothing is wrong, 1 if something is, and 2 if the file is not a model.
    """
    from rtdetr_act.workflows.doctor import examine

    found = examine(require(model, "doctor needs a model", "rtdetr-act doctor best.pt"))
    print(found)
    if not found.healthy:
        raise typer.Exit(1)
