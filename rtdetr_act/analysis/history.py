"""Learned quantities of activations by epoch: the `activations.csv` of a run."""

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
    """Add the quantities of an epoch to an `activations.csv`, atomically.

    Rows of this epoch and of later ones, which a resumed training has left, are replaced.

    Args:
        path: The file, created if missing.
        epoch: Number of the epoch; 0 for the state before the first step.
        quantities: As `read_quantities` returns them.

    Raises:
        OSError: The disk is full or the file is not writable; it is then unchanged.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for quantity in quantities:
        layer = "" if quantity.layer is None else quantity.layer
        rows.writerow((epoch, quantity.site, layer, quantity.activation, quantity.name, f"{quantity.value:.6g}"))
    lines = [",".join(COLUMNS), *_read_earlier_lines(path, epoch)]
    write_atomically(path, ("\n".join(lines) + "\n" + text.getvalue()).encode())


def _read_earlier_lines(path: Path, epoch: int) -> list[str]:
    """Return the lines of earlier epochs, without the header; none if the file is missing or another one."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):  # ValueError: the file is empty or not text
        return []
    if header != ",".join(COLUMNS):
        return []
    epochs = [line.partition(",")[0] for line in lines]
    return [line for line, word in zip(lines, epochs, strict=True) if word.isdigit() and int(word) < epoch]


def read_history(path: Path) -> polars.DataFrame:
    """Return an `activations.csv` as a data frame with the columns of `COLUMNS`.

    Raises:
        InputError: The file cannot be read or has other columns.
    """
    try:
        schema = (polars.Int64, polars.String, polars.Int64, polars.String, polars.String, polars.Float64)
        history = polars.read_csv(path.read_bytes(), schema_overrides=dict(zip(COLUMNS, schema, strict=True)))
        return history.select(COLUMNS)
    except (OSError, polars.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"'{path}' cannot be read as the history of activations: {reason}") from None


def get_initial_values(history: polars.DataFrame) -> dict[tuple[str, str], float]:
    """Return the values before the first step, by site and quantity."""
    first = history.filter(history["epoch"] == 0).select("site", "quantity", "value")
    return {(site, quantity): value for site, quantity, value in first.iter_rows()}


def make_history(quantities: Sequence[Quantity], epoch: int = 0) -> polars.DataFrame:
    """Return quantities as a data frame like that of `read_history`, all of one epoch."""
    rows = [(epoch, each.site, each.layer, each.activation, each.name, each.value) for each in quantities]
    return polars.DataFrame(rows, schema=list(COLUMNS), orient="row")
