"""Curves of the activations in a model, site by site, coloured by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from torch import nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import get_title
from rtdetr_act.analysis.curve_sampling import Curve, sample_curves
from rtdetr_act.analysis.curves import draw_axes
from rtdetr_act.analysis.figures import (
    DPI,
    TWO_COLUMNS,
    check_dpi,
    check_figure_path,
    check_limits,
    figure_style,
    write_figure,
)
from rtdetr_act.errors import ModelError
from rtdetr_act.formatting import format_count
from rtdetr_act.surgery.sites import Site, find_sites
from rtdetr_act.surgery.tracing import get_built_channels

_QUARTILES = (0.25, 0.75)
_FUNCTIONS = 1024  # of a site, of which there are many
_LINES = ("-", "--", ":", "-.")  # of different activations in one model
_BRIGHTEST = 0.9  # the end of viridis is a yellow that is hard to see on white
_LIMITS = (-4.0, 4.0)
_MOST_BANDS = 12  # more of them are a blur


def plot_sites(
    model: nn.Module,
    output: Path | str,
    *,
    xlim: Sequence[float] | None = None,
    ylim: Sequence[float] | None = None,
    dpi: int = DPI,
) -> Path:
    """Plot the activations (left) and gradients (right) at all sites of a model with their present parameters.

    There is a line for each site, coloured by the layer it is in, and dashed or dotted for a second, third and fourth
    activation. A site with parameters per channel is the mean over its channels. So is one with coefficients
    generated from the input, over channels and random inputs that are standard normal with different channel means, as
    BatchNorm makes them; the coefficients of each are held constant. Where a mean stands for different functions, a
    band has the middle half of them, if there are twelve such sites at most.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module; it is left as it is.
        output: PNG, SVG or PDF file to write.
        xlim: Lowest and highest x. Default: None, -4 and 4.
        ylim: Lowest and highest f(x) that is shown; the gradients are shown whole. Default: None, all.
        dpi: Dots per inch of a PNG file. Default: 150.

    Returns:
        `output` as a path.

    Raises:
        ModelError: The model has no activation, or one that takes another input than its place in the model says.
        InputError: The suffix is not supported, the file cannot be written, or a number is out of range.
    """
    path = check_figure_path(output)
    limits, visible = check_limits("xlim", xlim or _LIMITS), None if ylim is None else check_limits("ylim", ylim)
    check_dpi(dpi)
    return write_figure(draw_sites(model, limits, visible), path, dpi=dpi)


@figure_style()
def draw_sites(model: nn.Module, limits: tuple[float, float], visible: tuple[float, float] | None = None) -> Figure:
    """Return the figure that `plot_sites` writes; arguments as there and in `draw_axes`."""
    sites = find_sites(model)
    if not sites:
        raise ModelError("the model has no activation to draw")

    titles = [_get_title(site) for site in sites]
    kinds = dict(Counter(titles).most_common())
    styles = {title: _LINES[index % len(_LINES)] for index, title in enumerate(kinds)}
    depths, label = _get_depths(sites)
    colours = ScalarMappable(Normalize(min(depths), max(*depths, 1)), _make_colormap())

    figure = Figure(figsize=(TWO_COLUMNS, 3.0))
    axes = draw_axes(figure, limits, visible)
    curves = [_sample_site(site, limits) for site in sites]
    banded = sum(curve.varies for curve in curves) <= _MOST_BANDS
    for index in order_by_turns(depths):
        style = {"color": colours.to_rgba(np.asarray(depths[index])), "linestyle": styles[titles[index]]}
        _draw_site(axes, curves[index], style, banded)
    figure.colorbar(colours, ax=axes, label=label, aspect=30, pad=0.02).outline.set_visible(False)
    if len(kinds) > 1:
        for each in kinds:
            axes[0].plot([], [], color="0.3", linestyle=styles[each], label=each)
        axes[0].legend()
    counts = (f"{each} at {format_count(count, 'site')}" for each, count in kinds.items())
    figure.suptitle(", ".join(counts), parse_math=False)
    return figure


def order_by_turns(depths: Sequence[int]) -> list[int]:
    """Return the order of drawing: sites of all depths in turns, so that the head, with the most, does not hide others.

    >>> order_by_turns([0, 1, 1, 1])
    [3, 2, 0, 1]
    """
    before = [depths[:index].count(depth) for index, depth in enumerate(depths)]
    return sorted(range(len(depths)), key=lambda index: (-before[index], depths[index]))


def _draw_site(axes: Any, curve: Curve, style: dict[str, Any], banded: bool) -> None:
    for axis, (low, mean, high) in zip(axes, (curve.values, curve.gradients), strict=True):
        axis.plot(curve.x, mean, linewidth=0.6, alpha=0.8, **style)
        if banded and curve.varies:
            axis.fill_between(curve.x, low, high, color=style["color"], alpha=0.08, linewidth=0)


def _get_title(site: Site) -> str:
    """Return the activation at a site as papers name it."""
    placed = get_placement(site.module)
    if placed or site.activation:
        return get_title(placed.spec if placed else str(site.activation))
    return site.current


def _get_depths(sites: Sequence[Site]) -> tuple[list[int], str]:
    """Return the depth of each site, and its label: the layer, or the number of the site if there are no layers."""
    layers = [site.layer for site in sites if site.layer is not None]
    if len(layers) == len(sites):
        return layers, "depth (layer of the model)"
    return list(range(len(sites))), "depth (site of the model)"


def _make_colormap() -> ListedColormap:
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, _BRIGHTEST, 256)))


def _sample_site(site: Site, limits: tuple[float, float]) -> Curve:
    """Return the curve at a site: that of its function, or quartiles of its functions."""
    module = site.module
    channels = site.channels or get_built_channels(module)
    try:
        (curve,) = sample_curves(
            module,
            channels,
            limits,
            layout=site.input_layout,
            dims=site.dims,
            quantiles=_QUARTILES,
            functions=_FUNCTIONS,
        )
    except (IndexError, RuntimeError, ValueError) as error:  # of torch, for an input of another shape
        raise ModelError(f"the curve of {site.name} ({site.current}) is unknown: {error}") from error
    return curve
