"""Heat maps of the learned quantities of activations, sites by epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rtdetr_act.analysis.figures import COLOURS, DPI, check_dpi, check_figure_path, figure_style, write_figure
from rtdetr_act.analysis.learned import SPREAD, layer_index

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import SubFigure


_ROW_HEIGHT, _MIN_HEIGHT = 0.15, 1.3  # inches: of a site with a readable name, and of a panel with few sites


_MIN_RELATIVE_CHANGE = 0.02  # the colour range spans at least this fraction of the initial value


@figure_style()
def draw_history(history: polars.DataFrame, output: Path | str, title: str = "", *, dpi: int = DPI) -> Path:
    """Plot learned quantities as heat maps of sites by epochs, and return the path of the figure.

    There is a row of panels per activation and a panel per quantity; sites are in the order of the network. If all
    sites of an activation start at the same value, that value is white, higher ones are red and lower ones blue. A
    history of a single epoch is drawn as points.

    Args:
        history: As `read_history` returns it.
        output: PNG, SVG or PDF file to write.
        title: Title of the figure.
        dpi: Dots per inch of a PNG file. Default: 150.

    Returns:
        `output` as a path.

    Raises:
        InputError: The suffix is not supported, the file cannot be written, or `dpi` is out of range.
    """
    path = check_figure_path(output)
    check_dpi(dpi)

    blocks = _group_by_activation(history)
    heights = [max(_MIN_HEIGHT, _ROW_HEIGHT * len(sites)) + 1.1 for sites, _ in blocks.values()]
    columns = max(len(panels) for _, panels in blocks.values())
    names = max(len(_shorten_site(site)) for sites, _ in blocks.values() for site in sites)
    width = 0.08 * names + 0.6 + columns * min(4.5, max(1.9, 14 / columns))
    figure = Figure(figsize=(max(width, 6.0), sum(heights) + 0.3))
    figure.suptitle(title, parse_math=False)
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, height, (activation, (sites, panels)) in zip(parts, heights, blocks.items(), strict=True):
        part.suptitle(activation, fontweight="bold")
        _draw_activation(part, sites, panels, (height - 1.0) / 0.1)
    return write_figure(figure, path, dpi=dpi)


def _group_by_activation(history: polars.DataFrame) -> dict[str, tuple[list[str], dict[str, polars.DataFrame]]]:
    """Return for each activation its sites and the values of each quantity to draw, spreads last."""
    families: dict[str, list[str]] = {}
    for site, activation in history.select("site", "activation").unique(maintain_order=True).iter_rows():
        families.setdefault(activation.partition("(")[0], []).append(site)
    blocks = {}
    for family, sites in families.items():
        own = history.filter(history["site"].is_in(sites))
        names, spreads = select_quantities(own["quantity"])
        blocks[family] = (sites, {name: own.filter(own["quantity"] == name) for name in [*names, *spreads]})
    return blocks


def select_quantities(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of the quantities to show for an activation, and separately those of their spreads.

    The norm of the weights is left out if there is another quantity.

    Args:
        names: Names of all quantities, repeated or not.

    >>> select_quantities(["weights_norm", "a1", "a1_spread", "a1"])
    (['a1'], ['a1_spread'])
    """
    distinct = list(dict.fromkeys(names))
    if len(distinct) > 1:  # the norm of all weights is the least informative
        distinct = [name for name in distinct if name != "weights_norm"]
    spreads = [name for name in distinct if name.endswith(SPREAD)]
    return [name for name in distinct if name not in spreads], spreads


def _draw_activation(part: SubFigure, sites: list[str], panels: Mapping[str, polars.DataFrame], ratio: float) -> None:
    """Draw the panels of one activation, a column per quantity, each with a colour bar below."""
    axes = part.subplots(2, len(panels), squeeze=False, gridspec_kw={"height_ratios": (ratio, 1)})
    starts = [row for row in range(1, len(sites)) if layer_index(sites[row]) != layer_index(sites[row - 1])]
    for column, (name, frame) in enumerate(panels.items()):
        axis, legend = axes[0, column], axes[1, column]
        axis.set_title(name.replace(SPREAD, " spread"))
        epochs, values = _to_matrix(frame, sites)
        if len(epochs) > 1:
            _draw_heatmap(part, axis, legend, epochs, values, name)
        else:
            axis.plot(values[:, 0], range(len(sites)), "o", color=COLOURS[0])
            legend.axis("off")
        axis.set_ylim(len(sites) - 0.5, -0.5)
        for row in starts:
            axis.axhline(row - 0.5, color="0.75", linewidth=0.5)
        axis.set_yticks(range(len(sites)), [_shorten_site(site) for site in sites] if column == 0 else [])
        axis.tick_params(axis="y", length=0)


def _draw_heatmap(part: SubFigure, axis: Any, legend: Any, epochs: range, values: np.ndarray, name: str) -> None:
    """Draw a quantity as a heat map of sites by epochs, with a colour bar."""
    image = axis.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="nearest",
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(values) - 0.5, -0.5),
        **_choose_colours(values, name),
    )
    axis.set_facecolor("0.85")  # missing epochs and values that are not finite
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(False)
    axis.set_xlabel("epoch")
    bar = part.colorbar(image, cax=legend, orientation="horizontal")
    bar.ax.xaxis.set_major_locator(MaxNLocator(3))


def _choose_colours(values: np.ndarray, name: str) -> dict[str, Any]:
    """Return colour map and limits for `imshow`: centred on the initial value if all sites share one."""
    first, finite = values[:, 0], values[np.isfinite(values)]
    if not len(finite):
        return {}
    if name.endswith(SPREAD):
        return {"vmin": 0.0, "vmax": float(finite.max()) or 1.0}
    if np.isfinite(first).all() and np.ptp(first) <= 1e-5 * max(1.0, abs(first[0])):
        reach = max(float(np.abs(finite - first[0]).max()), _MIN_RELATIVE_CHANGE * abs(float(first[0])), 1e-6)
        return {"cmap": "RdBu_r", "vmin": float(first[0]) - reach, "vmax": float(first[0]) + reach}
    return {"vmin": float(finite.min()), "vmax": float(finite.max())}


def _to_matrix(frame: polars.DataFrame, sites: Sequence[str]) -> tuple[range, np.ndarray]:
    """Return the range of epochs and the values of shape (sites, epochs), NaN where one is missing."""
    rows = {site: row for row, site in enumerate(sites)}
    cells = list(frame.select("epoch", "site", "value").iter_rows())
    first, last = min(cell[0] for cell in cells), max(cell[0] for cell in cells)
    values = np.full((len(sites), last - first + 1), np.nan)
    for epoch, site, value in cells:
        values[rows[site], epoch - first] = np.nan if value is None else value
    return range(first, last + 1), values


def _shorten_site(site: str) -> str:
    """Return the name of a site as an axis label: `model.9.m.3.cv2.act` becomes `9.m.3.cv2`."""
    return site.removeprefix("model.").removesuffix(".act")
