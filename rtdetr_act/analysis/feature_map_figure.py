"""Feature maps before and after activations as a figure, a block per site and a row per model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import get_title
from rtdetr_act.analysis.feature_maps import Capture, summarise_values
from rtdetr_act.analysis.figures import COLOURS, DPI, TWO_COLUMNS, figure_style
from rtdetr_act.errors import InputError
from rtdetr_act.surgery.sites import Site

_COLOURS = "RdBu_r"  # 0 is white
_CLIPPED = 0.5  # per cent of the drawn values whose magnitude is beyond the colour scale
_TAILS = 0.05  # per cent of the values on each side that the histograms leave out
_BINS = 60
_MOST_PIXELS = 2**16 - 1  # of Agg, which draws PNG files
# In inches: the left edges of the columns and their widths, and the heights of what is drawn.
_LABEL, _BEFORE, _AFTER, _HISTOGRAM = 0.12, 0.36, 2.74, 5.62
_MAPS_WIDTH, _HISTOGRAM_WIDTH = 2.26, TWO_COLUMNS - 5.62 - 0.12
_IMAGE, _HEADER, _TITLES, _SCALE = 0.85, 1.0, 0.4, 0.47
_MIN_ROW, _ROW_GAP, _GAP = 0.8, 0.1, 0.03


@dataclass(frozen=True)
class _Page:
    """A figure on which axes are placed in inches, from the left and from the top."""

    figure: Figure
    width: float
    height: float

    def add(self, left: float, top: float, width: float, height: float) -> Any:
        """Return new axes."""
        bottom = self.height - top - height
        rectangle = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(rectangle)

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write a text."""
        self.figure.text(left / self.width, 1 - top / self.height, text, parse_math=False, **style)


@dataclass(frozen=True)
class _Grid:
    """Feature maps of one size in rows.

    Attributes:
        count: Number of maps.
        columns: Maps side by side.
        height: Height of all rows, in inches.
    """

    count: int
    columns: int
    height: float

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.ceil(self.count / self.columns)


@figure_style()
def draw_feature_maps(
    image: Tensor, captures: Mapping[str, Mapping[str, Capture]], title: str, channels: int = 8, *, dpi: int = DPI
) -> Figure:
    """Draw feature maps of several models before and after their activations, with histograms of all values.

    There is a block per site and in it a row per model. Each model shows its own channels, those of `choose_channels`,
    the same before and after: channels of networks that were trained apart do not correspond. The colour scale of a
    block is that of all its maps, symmetric about 0, with the 0.5 % of largest magnitude beyond its ends. The
    histograms of a block share their axes, and leave out 0.05 % of the values on either side.

    Args:
        image: What the models got, (3, H, W) in [0, 1].
        captures: Captures by site, by the name of the model. Every site is one of the first model.
        title: Name of the image.
        channels: Maps of each model; fewer where the maps have fewer channels. Default: 8.
        dpi: Dots per inch of the figure. Default: 150.

    Returns:
        The figure, 7.16 inches wide.

    Raises:
        InputError: The figure would be too high to be drawn.
    """
    blocks = {
        name: {model: found[name] for model, found in captures.items() if name in found}
        for name in next(iter(captures.values()))
    }
    channels = min(channels, max(len(each.before) for found in captures.values() for each in found.values()))
    grid = _choose_grid(channels, image.shape[1] / image.shape[2])
    step = max(_MIN_ROW, grid.height) + _ROW_GAP
    height = _HEADER + sum(_TITLES + len(found) * step + _SCALE for found in blocks.values())
    if height * dpi > _MOST_PIXELS:
        raise InputError(
            f"{len(blocks)} sites with {channels} maps of {len(captures)} models are {height:,.0f} inches high, and at "
            f"{dpi} dpi {_MOST_PIXELS // dpi:,} can be drawn: choose fewer"
        )
    page = _Page(Figure(figsize=(TWO_COLUMNS, height), dpi=dpi), TWO_COLUMNS, height)
    page.figure.set_layout_engine("none")  # maps of the same size are placed faster and better by hand
    _draw_header(page, image, title, channels)
    top = _HEADER
    for found in blocks.values():
        top = _draw_block(page, top, step, found, grid)
    return page.figure


def _choose_grid(count: int, shape: float) -> _Grid:
    """Return the grid for a number of maps that comes near to a height that grows with it, and leaves little empty.

    Args:
        count: Number of maps.
        shape: Height of a map by its width.
    """
    target = 0.3 * math.sqrt(count)  # 0.85 inches for 8 maps
    grids = []
    for columns in range(1, count + 1):
        rows = math.ceil(count / columns)
        height = rows * _MAPS_WIDTH / columns * shape
        loss = abs(math.log(height / target)) + (rows * columns - count) / count
        grids.append((loss, _Grid(count, columns, height)))
    return min(grids, key=lambda each: each[0])[1]


def describe_activation(site: Site) -> str:
    """Return the activation at a site as papers name it, with the arguments of its spec, or as the module says."""
    if placed := get_placement(site.module):
        return get_title(placed.spec)
    return get_title(site.activation) if site.activation else site.current


def _draw_header(page: _Page, image: Tensor, title: str, channels: int) -> None:
    """Draw the image, what is shown of it, and the legend of the histograms."""
    _, height, width = image.shape
    scale = min(_IMAGE / height, _MAPS_WIDTH / width)
    axes = page.add(_BEFORE, 0.04 + _IMAGE - height * scale, width * scale, height * scale)
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), aspect="auto")
    axes.axis("off")
    maps = "the channel" if channels == 1 else f"the {channels} channels"
    lines = (
        f"{title}, {width} × {height} pixels as the networks get it",
        f"maps: {maps} of each network whose output",
        "varies most over the image",
    )
    left = _BEFORE + width * scale + 0.1
    for number, line in enumerate(lines):
        page.write(left, 0.04 + _IMAGE - 0.14 * (len(lines) - 1 - number), line, fontsize=7, va="bottom")
    page.figure.legend(
        handles=[
            Patch(facecolor="0.8", label="before the activation"),
            Line2D([], [], color=COLOURS[0], label="after it"),
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1 - (_IMAGE + 0.06) / page.height),
        borderaxespad=0.0,
    )


def _draw_block(page: _Page, top: float, step: float, found: Mapping[str, Capture], grid: _Grid) -> float:
    """Draw the block of a site: a row per model, and below them the scales.

    Args:
        page: The page.
        top: Upper edge of the block, in inches from the top of the page.
        step: From one row to the next, in inches.
        found: Captures by the name of the model.
        grid: Where the maps of a model are.

    Returns:
        Lower edge of the block.
    """
    _write_titles(page, top, next(iter(found.values())))
    chosen = {model: list(capture.choose_channels(grid.count)) for model, capture in found.items()}
    limit = _get_limit([each[chosen[model]] for model, c in found.items() for each in (c.before, c.after)])
    colours = ScalarMappable(Normalize(-limit, limit), _COLOURS)
    edges = _get_edges([each for capture in found.values() for each in (capture.before, capture.after)])
    top += _TITLES
    histograms = []
    for model, capture in found.items():
        _write_model(page, top + (step - _ROW_GAP) / 2, step, model, describe_activation(capture.site))
        for left, maps in ((_BEFORE, capture.before), (_AFTER, capture.after)):
            axes = page.add(left, top + (step - _ROW_GAP - grid.height) / 2, _MAPS_WIDTH, grid.height)
            _draw_maps(axes, maps[chosen[model]].numpy(), grid, colours)
        histograms.append(page.add(_HISTOGRAM, top, _HISTOGRAM_WIDTH, step - _ROW_GAP))
        top += step
    _draw_histograms(histograms, list(found.values()), edges)
    _draw_scale(page, top, colours)
    return top + _SCALE


def _write_titles(page: _Page, top: float, capture: Capture) -> None:
    """Write the site above its block, and titles above the columns."""
    site, (channels, height, width) = capture.site, capture.before.shape
    layer = "" if site.layer is None else f"layer {site.layer}: "
    page.write(_BEFORE, top + 0.05, f"{layer}{site.name}", fontsize=9, fontweight="bold", va="top")
    page.write(
        _AFTER + _MAPS_WIDTH, top + 0.05, f"{channels} channels of {width} × {height}", fontsize=8, va="top", ha="right"
    )
    titles = {
        _BEFORE + _MAPS_WIDTH / 2: "before the activation",
        _AFTER + _MAPS_WIDTH / 2: "after it",
        _HISTOGRAM + _HISTOGRAM_WIDTH / 2: "values of all channels",
    }
    for left, text in titles.items():
        page.write(left, top + _TITLES - 0.04, text, fontsize=8, ha="center", va="bottom")


def _write_model(page: _Page, middle: float, room: float, model: str, activation: str) -> None:
    """Write the activation of a row beside it, and the name of the model unless it is the same.

    Args:
        page: The page.
        middle: Middle of the row, in inches from the top of the page.
        room: Height of the row, in inches.
        model: Name of the model.
        activation: What stands at the site.
    """
    texts = [(_LABEL, activation, 8.0, {"fontweight": "bold"})]
    if _normalise(model) != _normalise(activation):
        texts.append((_LABEL + 0.12, model, 6.0, {"color": "0.4"}))
    for left, text, size, style in texts:
        fitting = min(size, room * 72 / (0.66 * len(text)))  # a letter is two thirds as wide as its size
        text = text if fitting >= 4 else f"…{text[-int(room * 72 / (0.66 * 4)) :]}"
        page.write(left, middle, text, fontsize=max(fitting, 4), rotation=90, ha="center", va="center", **style)


def _normalise(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _draw_maps(axes: Any, maps: np.ndarray[Any, Any], grid: _Grid, colours: ScalarMappable) -> None:
    """Draw feature maps (N, H, W) side by side into axes of the size of the grid."""
    axes.axis("off")
    width, height = _MAPS_WIDTH / grid.columns, grid.height / grid.rows
    for number, each in enumerate(maps):
        x, y = number % grid.columns * width, number // grid.columns * height
        extent = (x, x + width - _GAP, y + height - _GAP, y)
        axes.imshow(each, extent=extent, aspect="auto", interpolation="nearest", cmap=colours.cmap, norm=colours.norm)
        frame = Rectangle((x, y), width - _GAP, height - _GAP, fill=False, edgecolor="0.6", linewidth=0.4)
        axes.add_patch(frame)
    axes.set(xlim=(0, _MAPS_WIDTH), ylim=(grid.height, 0))  # after imshow, which sets them to the map


def _draw_histograms(rows: Sequence[Any], captures: Sequence[Capture], edges: np.ndarray[Any, Any]) -> None:
    """Draw the densities of all values before and after activations, on the same scale.

    Args:
        rows: Axes, one for each capture.
        captures: The captures.
        edges: Edges of the bins.
    """
    densities = [[_compute_density(values, edges) for values in (each.before, each.after)] for each in captures]
    found = np.concatenate([each for pair in densities for each in pair])
    high = found.max(initial=0.0) or 1.0
    low = found[found > 0].min(initial=high) / 1.5
    for axes, capture, (before, after) in zip(rows, captures, densities, strict=True):
        axes.stairs(before, edges, baseline=low, fill=True, color="0.8")
        axes.stairs(after, edges, baseline=low, color=COLOURS[0], linewidth=0.9)
        axes.axvline(0, color="0.4", linewidth=0.5, zorder=0)
        # A third of the height is for the text.
        axes.set(yscale="log", xlim=(edges[0], edges[-1]), ylim=(low, high * (high / low) ** 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelbottom=axes is rows[-1])
        for line, (values, colour) in enumerate(((capture.before, "0.35"), (capture.after, COLOURS[0]))):
            counted = summarise_values(values)
            text = f"{counted.zeros:.1%} zero, {counted.negative:.1%} negative"
            axes.annotate(text, (1, 1), (0, -8 * line), "axes fraction", "offset points", va="top", ha="right",
                          fontsize=6, color=colour)  # fmt: skip
    rows[len(rows) // 2].set_ylabel("density")
    rows[-1].set_xlabel("value", labelpad=1)


def _compute_density(values: Tensor, edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the share of values in each bin, divided by its width."""
    counts, _ = np.histogram(values.flatten().double().numpy(), edges)
    return counts / values.numel() / np.diff(edges)


def _draw_scale(page: _Page, top: float, colours: ScalarMappable) -> None:
    """Draw the colour scale of a block below its maps."""
    axes = page.add(_BEFORE + _MAPS_WIDTH / 2, top, _MAPS_WIDTH + 0.1, 0.07)
    bar = page.figure.colorbar(colours, cax=axes, orientation="horizontal", extend="both")
    bar.ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    bar.ax.grid(False)
    bar.set_label("value", labelpad=1)


def _get_limit(maps: Sequence[Tensor]) -> float:
    """Return the end of a symmetric colour scale for some maps."""
    found = np.concatenate([np.abs(each.flatten().numpy()) for each in maps])
    found = found[np.isfinite(found)]
    if not found.any():
        return 1.0
    return float(np.percentile(found, 100 - _CLIPPED)) or float(found.max())  # 0 where nearly all are


def _get_edges(values: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """Return the edges of bins of equal width over some tensors, of which 0 is one."""
    finite = [flat[np.isfinite(flat)] for flat in (each.flatten().double().numpy() for each in values)]
    ends = [np.percentile(each, (_TAILS, 100 - _TAILS)) for each in finite if len(each)]
    low = min((each[0] for each in ends), default=0.0)
    high = max((each[1] for each in ends), default=0.0)
    size = max(abs(low), abs(high))
    if high - low <= 1e-6 * size:  # float32 tells no more apart
        low, high = low - (size or 1.0) / 2, high + (size or 1.0) / 2
    step = (high - low) / _BINS
    return np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
