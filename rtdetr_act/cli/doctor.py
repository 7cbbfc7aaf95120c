"""The command that examines a model: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from rtdetr_act.cli.app import app


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Checkpoint, model YAML, or run folder, whose best.pt is examined.")],
) -> None:
    """Examine whether an activation is really in a model, learned, and survives training; nothing is written.

    The exit code is 0 if nothing is wrong, 1 if something is, and 2 if the file is not a model.
    """
    from rtdetr_act.workflows.doctor import examine

    found = examine(model)
    print(found)
    if not found.healthy:
        raise typer.Exit(1)
