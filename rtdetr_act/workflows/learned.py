"""Read what the activations of a checkpoint learned, with the history of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rtdetr_act.analysis.history import HISTORY_FILE, read_history
from rtdetr_act.analysis.learned import Quantity, has_coefficients, read_quantities
from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.images import open_validation, pick_images, trained_side
from rtdetr_act.integrations.ultralytics.models import load_model

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True)
class Learned:
    """What the activations of a checkpoint learned.

    Attributes:
        quantities: What they are now, in the order of the sites.
        start: What they were before the first step, by (site, quantity); empty where that is not known.
        history: The `activations.csv` of the run that the checkpoint lies in, if it has one.
        note: What the reader should know of where the coefficients come from, or "".
    """

    quantities: list[Quantity]
    start: Mapping[tuple[str, str], float]
    history: polars.DataFrame | None = None
    note: str = ""


def read_checkpoint(weights: str, data: str | None = None) -> Learned:
    """Read what the activations of a checkpoint learned, with the history of its run where that is there.

    What Dynamic ReLU and Meta-ACON generate depends on images: it is measured on validation images of `data`, else
    taken from the last epoch of the history, else left out.

    Args:
        weights: A checkpoint. The history is looked for where Ultralytics puts checkpoints, as `../activations.csv`.
        data: A data set YAML, or "shapes".

    Raises:
        ModelError: The file is no checkpoint, or none of its activations learns.
        InputError: There is no such file or data set, or the history is damaged.
    """
    if not weights.endswith(".pt"):
        raise InputError(f"{quote(weights)} is not a checkpoint: give a .pt file")
    source = resolve_data(data) if data is not None else None
    loaded = load_model(weights)
    model = loaded.model
    quantities = read_quantities(model)
    if not quantities:
        raise ModelError(
            f"'{weights}' has no learnable activations that rtdetr-act placed (a folded one has none left)"
        )
    path = Path(weights).absolute().parent.parent / HISTORY_FILE
    history = read_history(path) if path.is_file() else None
    start, note = {}, ""
    if history is not None:
        first = history.filter(history["epoch"] == 0).select("site", "quantity", "value")
        start = {(site, name): value for site, name, value in first.iter_rows()}
    if has_coefficients(model):
        if source is not None:
            known = check_data(source, str(loaded.task))
            _, dataset = open_validation(loaded, known, trained_side(loaded, 640))
            quantities = read_quantities(model, pick_images(dataset))
        elif history is not None:
            quantities, note = _complete(quantities, history)
        else:
            note = (
                "some coefficients are made from the image: give --data DATASET.yaml to see them on validation images"
            )
    return Learned(quantities, start, history, note)


def _complete(quantities: Sequence[Quantity], history: polars.DataFrame) -> tuple[list[Quantity], str]:
    """Add what the last epoch of a history knows beyond a checkpoint, site by site."""
    last = int(history["epoch"].max() or 0)  # type: ignore[arg-type]
    rows = history.filter(history["epoch"] == last).select("site", "activation", "quantity", "value").iter_rows()
    known: dict[str, list[Quantity]] = {}
    for row in rows:
        known.setdefault(row[0], []).append(Quantity(*row))
    found = []
    for site, group in groupby(quantities, key=lambda read: read.site):
        own = list(group)
        names = {read.name for read in own}
        found += [*own, *(read for read in known.get(site, ()) if read.name not in names)]
    note = f"coefficients made from the image are of epoch {last} in {HISTORY_FILE}: --data DATASET.yaml measures them"
    return found, note
