"""Report what the activations of a checkpoint learned, with the history of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_act.analysis.figures import DPI, check_dpi, check_figure_path
from rtdetr_act.analysis.history import HISTORY_FILE, get_initial_values, make_history, read_history
from rtdetr_act.analysis.history_figure import draw_history
from rtdetr_act.analysis.learned import Quantity, has_coefficients, read_quantities
from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.images import open_validation, pick_images, training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.results import Table, TableResult, to_plain

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True, repr=False)
class Learned(TableResult):
    """Learned parameters and generated coefficients of the activations of a checkpoint.

    Attributes:
        quantities: Current values, in the order of the sites.
        start: Values before the first step, by (site, quantity); empty where they are not known.
        history: The `activations.csv` of the run that the checkpoint lies in; None where there is none.
        note: Where the coefficients come from, or why they are missing, in one sentence; "" where nothing is to say.
    """

    quantities: list[Quantity]
    start: Mapping[tuple[str, str], float]
    history: polars.DataFrame | None = None
    note: str = ""

    def _summarise(self) -> str:
        """Return the numbers of quantities and sites."""
        sites = len({quantity.site for quantity in self.quantities})
        return f"{len(self.quantities)} quantities of {format_count(sites, 'site')}"

    def _make_table(self) -> Table:
        """Return a row per quantity; `start` is unknown without a history."""
        return ("site", "layer", "activation", "quantity", "start", "value"), (
            (each.site, each.layer, each.activation, each.name, self.start.get((each.site, each.name)), each.value)
            for each in self.quantities
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data: `quantities` as in the CSV file, and `history` as lists by its columns."""
        columns, rows = self._make_table()
        return {
            "quantities": [dict(zip(columns, to_plain(row), strict=True)) for row in rows],
            "history": None if self.history is None else to_plain(self.history.to_dict(as_series=False)),
            "note": self.note,
        }


def report_learned(
    weights: str | Path,
    output: str | Path,
    data: str | Path | None = None,
    *,
    show: Callable[[Learned], object] | None = None,
    dpi: int = DPI,
) -> tuple[Learned, Path]:
    """Read what the activations of a checkpoint learned, and draw it.

    Args:
        weights: A .pt checkpoint.
        output: PNG, SVG or PDF file to write.
        data: As in `read_learned`.
        show: Called with the values before they are drawn.
        dpi: Dots per inch of a PNG file. Default: 150; journals ask for 300.

    Returns:
        The values, and the path written.

    Raises:
        ModelError: The file is not a checkpoint, or none of its activations learns.
        InputError: The checkpoint or the data set does not exist, the history is damaged, or the figure cannot be
            written.
    """
    path = check_figure_path(output)
    check_dpi(dpi)
    found = read_learned(weights, data)
    if show:
        show(found)
    history = make_history(found.quantities) if found.history is None else found.history
    return found, draw_history(history, path, str(weights), dpi=dpi)


def read_learned(weights: str | Path, data: str | Path | None = None) -> Learned:
    """Read what the activations of a checkpoint learned, with the history of its run where there is one.

    Coefficients that Dynamic ReLU and Meta-ACON generate depend on the image. They are measured on 16 validation images
    of `data`, else taken from the last epoch of the history, else left out.

    Args:
        weights: A .pt checkpoint. Its history is `../activations.csv`, seen from the folder of the checkpoint.
        data: Data set, as in Ultralytics, or "shapes"; None (default) to measure nothing.

    Raises:
        ModelError: The file is not a checkpoint, or none of its activations learns.
        InputError: The checkpoint or the data set does not exist, or the history is damaged.
    """
    weights = str(weights)
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
    start, note = {} if history is None else get_initial_values(history), ""
    if has_coefficients(model):
        if source is not None:
            _, dataset = open_validation(loaded, check_data(source, str(loaded.task)), training_imgsz(loaded, 640))
            quantities = read_quantities(model, pick_images(dataset))
        elif history is not None:
            quantities, note = _complete(quantities, history)
        else:
            note = "some coefficients are made from the image: give data=DATASET.yaml to see them on validation images"
    return Learned(quantities, start, history, note)


def _complete(quantities: Sequence[Quantity], history: polars.DataFrame) -> tuple[list[Quantity], str]:
    """Add the quantities of the last epoch of a history that a checkpoint does not hold, site by site."""
    last = int(history["epoch"].max() or 0)  # type: ignore[arg-type]
    rows = history.filter(history["epoch"] == last).select("site", "activation", "quantity", "value").iter_rows()
    recorded: dict[str, list[Quantity]] = {}
    for row in rows:
        recorded.setdefault(row[0], []).append(Quantity(*row))
    completed: list[Quantity] = []
    for site, group in groupby(quantities, key=lambda quantity: quantity.site):
        own = list(group)
        names = {quantity.name for quantity in own}
        completed += [*own, *(quantity for quantity in recorded.get(site, ()) if quantity.name not in names)]
    note = f"coefficients made from the image are of epoch {last} in {HISTORY_FILE}: data=DATASET.yaml measures them"
    return completed, note
