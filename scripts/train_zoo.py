"""Train every activation of the zoo inside rtdetr-n and yolo11n on `shapes` for one epoch, and print what came of it.

    python scripts/train_zoo.py [--model yolo11n.yaml] [name …]

Exits with 1 if the loss of an entry became non-finite, unless the zoo says it is not meant for training. About twenty
minutes on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rtdetr_act.activations.registry import get_entry, names
from rtdetr_act.errors import TrainingError
from rtdetr_act.workflows.train import train_variants

ARGUMENTS = {"threshold": "threshold(0.0, 0.0)"}
MODELS = ("rtdetr-n.yaml", "yolo11n.yaml")


def main(
    wanted: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Activations; all if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models; rtdetr-n and yolo11n if none.")] = None,
) -> None:
    """Train, print the table, and exit with 1 if a training failed that should not."""
    models = model or MODELS
    columns = (column for name in models for column in (f"loss, {Path(name).stem}", f"mAP50, {Path(name).stem}"))
    table = Table("activation", *columns, "meant for training")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted or names():
            note = get_entry(name).note
            cells = []
            for each in models:
                try:
                    cells += train(each, name, folder)
                except TrainingError as error:
                    cells += [str(error), "-"]
                    failed = failed or not note
            table.add_row(name, *cells, f"no: {note}" if note else "yes")
            print(name, *cells, flush=True)
    Console(width=160).print(table)
    raise typer.Exit(int(failed))


def train(model: str, name: str, folder: str) -> list[str]:
    """Train a model with an activation for one epoch, and return the sum of its losses and its mAP50."""
    settings = {"epochs": 1, "project": folder, "verbose": False}
    (outcome,) = train_variants(model, [ARGUMENTS.get(name, name)], "shapes", settings)
    return [read_loss(outcome.folder), f"{(outcome.scores or {}).get('mAP50', 0):.4f}"]


def read_loss(folder: Path | None) -> str:
    """Return the sum of the training losses in the last row of a run's results."""
    header, *_, last = (Path(str(folder)) / "results.csv").read_text().splitlines()
    row = dict(zip(header.replace(" ", "").split(","), last.split(","), strict=True))
    return f"{sum(float(value) for key, value in row.items() if key.startswith('train/')):.3f}"


if __name__ == "__main__":
    typer.run(main)
