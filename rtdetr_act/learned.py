"""What activations learned: read from a model, kept epoch by epoch in a run's `activations.csv`, and drawn."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.files import write_atomically
from rtdetr_act.images import open_validation, pick_images, trained_side
from rtdetr_act.plot import check_picture, write_picture
from rtdetr_act.sites import MARK, left_as_it_was, placed_activations
from rtdetr_act.training import slopes

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import SubFigure

HISTORY_FILE = "activations.csv"  # in the run folder
PICTURE_FILE = "activations.png"
SPREAD = "_spread"  # ends the name of how far a quantity differs between images
COLUMNS = ("epoch", "site", "layer", "activation", "quantity", "value")
_IMAGES = 16
_LAYER = re.compile(r"(?:^|\.)model\.(\d+)\.")


@dataclass(frozen=True)
class Quantity:
    """One number that an activation learned.

    Attributes:
        site: Qualified name of the activation, as in `model.9.m.3.cv2.act`.
        activation: What stands there, as the plan names it.
        name: Which number of it, such as "alpha".
        value: The number.
    """

    site: str
    activation: str
    name: str
    value: float

    @property
    def layer(self) -> int | None:
        """Index of the Ultralytics layer, None in other models."""
        return layer_of(self.site)


def layer_of(site: str) -> int | None:
    """Return the index of the Ultralytics layer that a site is in, None in other models.

    >>> layer_of("model.9.m.3.cv2.act"), layer_of("features.0.1")
    (9, None)
    """
    found = _LAYER.search(site)
    return int(found[1]) if found else None


# --- reading --------------------------------------------------------------------------------------------------------


def learned_parameters(model: nn.Module, images: Sequence[Tensor] = ()) -> dict[str, float]:
    """Return what `read_quantities` reads, by `site.quantity`.

    >>> from rtdetr_act import patch_model
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> _ = patch_model(model, "prelu")
    >>> learned_parameters(model)
    {'1.weight': 0.25}
    """
    return {f"{read.site}.{read.name}": read.value for read in read_quantities(model, images)}


@torch.no_grad()
def read_quantities(model: nn.Module, images: Sequence[Tensor] = (), *, batch: int = _IMAGES) -> list[Quantity]:
    """Read what the activations learned that a swap placed in a model.

    AReLU's are as it uses them, `alpha` clamped to 0.01..0.99 and `beta` the sigmoid of the stored one. A parameter
    per channel is its mean over the channels; PReLU's `weight` then has `weight_min` and `weight_max` beside it. Of the
    weights that generate slopes from the input (Dynamic ReLU, Meta-ACON) or make a condition of it (FReLU), a site has
    `weights_norm`, the L2 norm of them all.

    With images, what is generated is measured too, in one pass in evaluation mode that leaves the model as it was:
    Dynamic ReLU's `a1`, `a2`, `b1`, `b2` and Meta-ACON's `beta`, each as the mean over images and channels, and as
    `…_spread`, the standard deviation over the images, averaged over the channels. `pi` of variant C is the mean over
    positions, `pi_spread` its standard deviation over the positions of an image, averaged over the images.

    Args:
        model: A task model, or any patched module.
        images: What the model takes, (C, H, W) each: bytes, which become 0..1, or floats as they are.
        batch: Images of one size that may go through the model at once.

    Returns:
        The quantities in the order of the sites; empty for a model without learnable placed activations.
    """
    single = {id(parameter) for parameter in slopes(model)}
    measured = _measure(model, images, batch) if images and has_coefficients(model) else {}
    return [
        Quantity(site, str(getattr(activation, MARK)["activation"]), name, value.item())
        for site, activation in placed_activations(model)
        for name, value in chain(_summaries(activation, single), measured.get(site, ()))
    ]


def _summaries(activation: nn.Module, single: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, scalar) of one activation; `single` has the ids of scalar and per-channel parameters."""
    if isinstance(activation, AReLU):
        yield "alpha", activation.slopes()[1]
        yield "beta", torch.sigmoid(activation.beta)
        return
    weights = []
    for name, parameter in activation.named_parameters():
        if id(parameter) in single:
            yield name, parameter.float().mean()
            if isinstance(activation, nn.PReLU) and parameter.numel() > 1:
                yield f"{name}_min", parameter.min()
                yield f"{name}_max", parameter.max()
        else:
            weights.append(parameter.float().norm())
    if weights:
        yield "weights_norm", torch.stack(weights).norm()


def has_coefficients(model: nn.Module) -> bool:
    """Say whether a model has activations that generate their coefficients from the input."""
    return next(_generators(model), None) is not None


def _generators(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in placed_activations(model) if hasattr(module, "named_coefficients"))


def _measure(model: nn.Module, images: Sequence[Tensor], batch: int) -> dict[str, list[tuple[str, Tensor]]]:
    """Return (name, scalar) of what the activations generate for the images, by site."""
    seen: dict[str, dict[str, list[tuple[Tensor, Tensor | None]]]] = {}

    def note(site: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        for name, value in module.named_coefficients(inputs[0]).items():
            seen.setdefault(site, {}).setdefault(name, []).append(_over_positions(value.float()))

    device = next(model.parameters()).device
    with left_as_it_was(model):
        model.eval()
        handles = [
            module.register_forward_pre_hook(lambda module, inputs, site=site: note(site, module, inputs))
            for site, module in _generators(model)
        ]
        try:
            for chunk in _chunks(images, batch):
                stack = torch.stack(chunk).to(device)
                model(stack.float() / 255 if stack.dtype == torch.uint8 else stack)
        finally:
            for handle in handles:
                handle.remove()
    return {
        site: [summary for name, parts in found.items() for summary in _mean_and_spread(name, parts)]
        for site, found in seen.items()
    }


def _over_positions(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the means of (B, C, …) over positions, (B, C), and their deviations where there are positions."""
    flat = value.flatten(2) if value.ndim > 2 else value[..., None]
    return flat.mean(-1), flat.std(-1, correction=0) if flat.shape[-1] > 1 else None


def _mean_and_spread(name: str, parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[str, Tensor]]:
    means = torch.cat([mean for mean, _ in parts])
    within = [deviation for _, deviation in parts if deviation is not None]
    spread = torch.cat(within).mean() if within else means.std(0, correction=0).mean()
    return [(name, means.mean()), (name + SPREAD, spread)]


def _chunks(images: Sequence[Tensor], batch: int) -> Iterator[list[Tensor]]:
    """Yield neighbours of one size, since YOLO validates rectangles."""
    for _, group in groupby(images, key=lambda image: image.shape):
        same = list(group)
        yield from (same[start : start + batch] for start in range(0, len(same), batch))


# --- activations.csv ------------------------------------------------------------------------------------------------


def save_quantities(path: Path, epoch: int, quantities: Sequence[Quantity]) -> None:
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
    lines = [",".join(COLUMNS), *_lines_before(path, epoch)]
    write_atomically(path, ("\n".join(lines) + "\n" + text.getvalue()).encode())


def _lines_before(path: Path, epoch: int) -> list[str]:
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
    import polars

    try:
        schema = (polars.Int64, polars.String, polars.Int64, polars.String, polars.String, polars.Float64)
        history = polars.read_csv(path.read_bytes(), schema_overrides=dict(zip(COLUMNS, schema, strict=True)))
        return history.select(COLUMNS)
    except (OSError, polars.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"'{path}' cannot be read as the history of activations: {reason}") from None


def as_history(quantities: Sequence[Quantity], epoch: int = 0) -> polars.DataFrame:
    """Return quantities of one moment in the form of a history."""
    import polars

    rows = [(epoch, read.site, read.layer, read.activation, read.name, read.value) for read in quantities]
    return polars.DataFrame(rows, schema=list(COLUMNS), orient="row")


# --- a checkpoint ---------------------------------------------------------------------------------------------------


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
    from rtdetr_act.runs import check_data, load_model, resolve_data

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


# --- the picture ----------------------------------------------------------------------------------------------------

_ROW, _SMALLEST = 0.15, 1.3  # inches: of a site, whose name is then readable, and of a panel of few sites
_LEAST_SHARE = 0.02  # of the axis: changes smaller than this of the value itself are not blown up to full colour


def draw_history(history: polars.DataFrame, output: Path | str, title: str = "") -> Path:
    """Draw sites, in the order of the network, by epochs: a heat map for each quantity, a row of them per activation.

    Where all sites of an activation start at one value, white is that value, red above it, blue below it. A history of
    one moment is drawn as points.

    Args:
        history: As `read_history` gives it.
        output: PNG, SVG or PDF file to write.
        title: Above the picture.

    Returns:
        The path written.

    Raises:
        InputError: The file's ending or folder is wrong, or it cannot be written.
    """
    path = check_picture(output)
    from matplotlib.figure import Figure

    blocks = _blocks(history)
    heights = [max(_SMALLEST, _ROW * len(sites)) + 1.1 for sites, _ in blocks.values()]
    columns = max(len(panels) for _, panels in blocks.values())
    names = max(len(_short(site)) for sites, _ in blocks.values() for site in sites)
    width = 0.08 * names + 0.6 + columns * min(4.5, max(1.9, 14 / columns))
    figure = Figure(figsize=(max(width, 6.0), sum(heights) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, height, (activation, (sites, panels)) in zip(parts, heights, blocks.items(), strict=True):
        part.suptitle(activation, fontsize=10, fontweight="bold")
        _draw_block(part, sites, panels, (height - 1.0) / 0.1)
    return write_picture(figure, path, dpi=110)


def _blocks(history: polars.DataFrame) -> dict[str, tuple[list[str], dict[str, polars.DataFrame]]]:
    """Return for each activation its sites, and its quantities to draw, the spreads behind the others."""
    families: dict[str, list[str]] = {}
    for site, activation in history.select("site", "activation").unique(maintain_order=True).iter_rows():
        families.setdefault(activation.partition("(")[0], []).append(site)
    blocks = {}
    for family, sites in families.items():
        own = history.filter(history["site"].is_in(sites))
        names, spreads = worth_showing(own["quantity"])
        blocks[family] = (sites, {name: own.filter(own["quantity"] == name) for name in [*names, *spreads]})
    return blocks


def worth_showing(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the quantities of an activation to show, in their order, and the spreads among them apart.

    >>> worth_showing(["weights_norm", "a1", "a1_spread", "a1"])
    (['a1'], ['a1_spread'])
    """
    found = list(dict.fromkeys(names))
    if len(found) > 1:  # the norm of all weights says least where there is something else
        found = [name for name in found if name != "weights_norm"]
    spreads = [name for name in found if name.endswith(SPREAD)]
    return [name for name in found if name not in spreads], spreads


def _draw_block(part: SubFigure, sites: list[str], panels: Mapping[str, polars.DataFrame], ratio: float) -> None:
    axes = part.subplots(2, len(panels), squeeze=False, gridspec_kw={"height_ratios": (ratio, 1)})
    starts = [row for row in range(1, len(sites)) if layer_of(sites[row]) != layer_of(sites[row - 1])]
    for column, (name, frame) in enumerate(panels.items()):
        axis, legend = axes[0, column], axes[1, column]
        axis.set_title(name.replace(SPREAD, " spread"), fontsize=9)
        epochs, values = _as_matrix(frame, sites)
        if len(epochs) > 1:
            _draw_heat(part, axis, legend, epochs, values, name)
        else:
            axis.plot(values[:, 0], range(len(sites)), "o", markersize=4, color="#0072B2")
            axis.grid(alpha=0.3)
            axis.tick_params(axis="x", labelsize=7)
            legend.axis("off")
        axis.set_ylim(len(sites) - 0.5, -0.5)
        for row in starts:
            axis.axhline(row - 0.5, color="0.75", linewidth=0.5)
        axis.set_yticks(range(len(sites)), [_short(site) for site in sites] if column == 0 else [], fontsize=7)
        axis.tick_params(axis="y", length=0)


def _draw_heat(part: SubFigure, axis: Any, legend: Any, epochs: range, values: np.ndarray, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(values) - 0.5, -0.5),
        **_colours(values, name),
    )
    axis.set_facecolor("0.85")  # epochs that are missing, numbers that are none
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("epoch", fontsize=8)
    bar = part.colorbar(image, cax=legend, orientation="horizontal")
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))
    bar.ax.tick_params(labelsize=7)
    bar.ax.xaxis.get_offset_text().set_fontsize(7)


def _colours(values: np.ndarray, name: str) -> dict[str, Any]:
    """Return colour map and limits: around the start where there is one for all, else from least to greatest."""
    first, finite = values[:, 0], values[np.isfinite(values)]
    if not len(finite):
        return {}
    if name.endswith(SPREAD):
        return {"cmap": "viridis", "vmin": 0.0, "vmax": float(finite.max()) or 1.0}
    if np.isfinite(first).all() and np.ptp(first) <= 1e-5 * max(1.0, abs(first[0])):
        reach = max(float(np.abs(finite - first[0]).max()), _LEAST_SHARE * abs(float(first[0])), 1e-6)
        return {"cmap": "RdBu_r", "vmin": float(first[0]) - reach, "vmax": float(first[0]) + reach}
    return {"cmap": "viridis", "vmin": float(finite.min()), "vmax": float(finite.max())}


def _as_matrix(frame: polars.DataFrame, sites: Sequence[str]) -> tuple[range, np.ndarray]:
    """Return the epochs, without gaps, and values (sites, epochs), NaN where there is none."""
    rows = {site: row for row, site in enumerate(sites)}
    found = list(frame.select("epoch", "site", "value").iter_rows())
    first, last = min(row[0] for row in found), max(row[0] for row in found)
    values = np.full((len(sites), last - first + 1), np.nan)
    for epoch, site, value in found:
        values[rows[site], epoch - first] = np.nan if value is None else value
    return range(first, last + 1), values


def _short(site: str) -> str:
    """Return the name of a site as an axis shows it: `model.9.m.3.cv2.act` becomes `9.m.3.cv2`."""
    return site.removeprefix("model.").removesuffix(".act")
