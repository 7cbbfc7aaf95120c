"""Train every activation of the zoo inside rtdetr-n on `shapes` for one epoch, and print what each run gave.

    python scripts/train_zoo.py [name …]

Exits with 1 if the loss of an entry became non-finite, unless the zoo says it is not meant for training. About ten
minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rtdetr_act.activations.registry import get_entry, names
from rtdetr_act.errors import TrainingError
from rtdetr_act.workflows.train import train_variants

ARGUMENTS = {"threshold": "threshold(0.0, 0.0)"}


def main(wanted: list[str]) -> int:
    """Train, print the table, and return the exit code."""
    table = Table("activation", "loss", "mAP50", "meant for training")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"epochs": 1, "project": folder, "verbose": False}
        for name in wanted or names():
            try:
                (outcome,) = train_variants("rtdetr-n.yaml", [ARGUMENTS.get(name, name)], "shapes", settings)
                loss, score = read_loss(outcome.folder), f"{(outcome.scores or {}).get('mAP50', 0):.4f}"
            except TrainingError as error:
                loss, score = str(error), "-"
                failed += [] if get_entry(name).note else [name]
            table.add_row(name, loss, score, "no: " + get_entry(name).note if get_entry(name).note else "yes")
    Console(width=160).print(table)
    return 1 if failed else 0


def read_loss(folder: Path | None) -> str:
    """Return the sum of the training losses in the last row of a run's results."""
    header, *_, last = (Path(str(folder)) / "results.csv").read_text().splitlines()
    row = dict(zip(header.replace(" ", "").split(","), last.split(","), strict=True))
    return f"{sum(float(value) for key, value in row.items() if key.startswith('train/')):.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
