"""What activations learned, epoch by epoch: a run's `activations.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import polars

from rtdetr_act.analysis.learned import Quantity
from rtdetr_act.errors import InputError
from rtdetr_act.files import write_atomically

HISTORY_FILE = "activations.csv"  # in the run folder


FIGURE_FILE = "activations.png"


COLUMNS = ("epoch", "site", "layer", "activation", "quantity", "value")


def write_quantities(path: Path, epoch: int, quantities: Sequence[Quantity]) -> None:
    """Write the rows of an epoch, 0 for the state before the first step, whole or not at all.

    Rows of this epoch and later ones, which a training left that was then resumed before them, are replaced.

    Raises:
        OSError: The disk is full or the file cannot be written; it is then as it was.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for read in quantities:
        layer = "" if read.layer is None else read.layer
        rows.writerow((epoch, read.site, layer, read.activation, read.name, f"{read.value:.6g}"))
    lines = [",".join(COLUMNS), *_read_earlier_lines(path, epoch)]
    write_atomically(path, ("\n".join(lines) + "\n" + text.getvalue()).encode())


def _read_earlier_lines(path: Path, epoch: int) -> list[str]:
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):  # ValueError: the file is empty or no text
        return []
    if header != ",".join(COLUMNS):
        return []
    epochs = [line.partition(",")[0] for line in lines]
    return [line for line, word in zip(lines, epochs, strict=True) if word.isdigit() and int(word) < epoch]


def read_history(path: Path) -> polars.DataFrame:
    """Return an `activations.csv`, with its own columns; InputError where it cannot be read or is another file."""
    try:
        schema = (polars.Int64, polars.String, polars.Int64, polars.String, polars.String, polars.Float64)
        history = polars.read_csv(path.read_bytes(), schema_overrides=dict(zip(COLUMNS, schema, strict=True)))
        return history.select(COLUMNS)
    except (OSError, polars.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"'{path}' cannot be read as the history of activations: {reason}") from None


def make_history(quantities: Sequence[Quantity], epoch: int = 0) -> polars.DataFrame:
    """Return quantities of one moment in the form of a history."""
    rows = [(epoch, read.site, read.layer, read.activation, read.name, read.value) for read in quantities]
    return polars.DataFrame(rows, schema=list(COLUMNS), orient="row")
