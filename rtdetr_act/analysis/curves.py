"""Curves of activations and of their gradients, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from rtdetr_act.activations import registry
from rtdetr_act.analysis.curve_sampling import Curve, sample_curves
from rtdetr_act.analysis.figures import (
    DPI,
    LINES,
    TWO_COLUMNS,
    check_dpi,
    check_figure_path,
    check_limits,
    figure_style,
    write_figure,
)
from rtdetr_act.spec import as_list

_CHANNELS = 64  # of DY-ReLU-B, each has a kink of its own, so that the quantiles of few are staircases
_DRAWN_CHANNELS = 3  # of an activation whose channels start apart: one looks as if it was the activation
_MOST_INSIDE = 7  # curves whose legend finds room inside the axes


def plot_activations(
    specs: str | Sequence[str],
    output: Path | str,
    *,
    limit: float = 4.0,
    xlim: Sequence[float] | None = None,
    ylim: Sequence[float] | None = None,
    dpi: int = DPI,
) -> Path:
    """Plot activations (left) and their gradients (right), and return the path of the figure.

    The legend has the names of the papers, and is outside the axes from eight activations on. Functions and gradients
    are computed in float64, and a jump is drawn where it is.

    Learnable activations are drawn at their initial parameters. One whose parameters are drawn at random for each
    channel, such as ACON-C, is as many functions: three channels are drawn, as thinner lines. An activation whose
    output depends on more than the element itself (dynamic coefficients, neighbours, other channels), or is random in
    training, is drawn as its mean with a band from the 5th to the 95th percentile: over random inputs, standard
    normal with different channel means, or over what it draws. Coefficients are held constant, so that the gradient is
    that of an element in a large map. A generator initialised to zero, such as that of DY-ReLU, is reset to torch's
    default initialisation.

    Args:
        specs: One or several names or specs of the zoo, such as "arelu" or "leaky_relu(0.1)".
        output: PNG, SVG or PDF file to write.
        limit: Half the width of the x axis, if there is no `xlim`.
        xlim: Lowest and highest x. Default: None, -limit and limit.
        ylim: Lowest and highest f(x) that is shown; the gradients are shown whole. Default: None, all.
        dpi: Dots per inch of a PNG file. Default: 150; journals ask for 300.

    Returns:
        `output` as a path.

    Raises:
        SpecError: An activation is unknown.
        InputError: The suffix is not supported, the file cannot be written, or a number is out of range.
    """
    path = check_figure_path(output)
    limits = check_limits("limit", (-limit, limit)) if xlim is None else check_limits("xlim", xlim)
    visible = None if ylim is None else check_limits("ylim", ylim)
    check_dpi(dpi)
    return write_figure(draw_activations(specs, limits, visible), path, dpi=dpi)


@figure_style()
def draw_activations(
    specs: str | Sequence[str], limits: tuple[float, float], visible: tuple[float, float] | None = None
) -> Figure:
    """Return the figure that `plot_activations` writes; arguments as there and in `draw_axes`."""
    names = list(dict.fromkeys(str(registry.resolve(spec)) for spec in as_list(specs)))
    curves = {name: sample_activation(name, limits) for name in names}
    figure = Figure(figsize=(TWO_COLUMNS, 2.9))
    axes = draw_axes(figure, limits, visible)
    for (name, own), style in zip(curves.items(), cycle(LINES), strict=False):
        draw_curves(axes, own, registry.get_title(name), style)
    if len(names) > _MOST_INSIDE:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    else:
        axes[0].legend()
    return figure


def draw_axes(figure: Figure, limits: tuple[float, float], visible: tuple[float, float] | None) -> Any:
    """Add the axes of f(x) and of f'(x) to a figure, and return them.

    Args:
        figure: The figure.
        limits: Lowest and highest x.
        visible: Lowest and highest f(x) that is shown; None for all.
    """
    axes = figure.subplots(1, 2)
    for axis, label in zip(axes, ("f(x)", "f′(x)"), strict=True):
        axis.set(xlabel="x", ylabel=label, xlim=limits)
        axis.axhline(0, color="0.5", linewidth=0.6, zorder=0.9)
        if limits[0] < 0 < limits[1]:
            axis.axvline(0, color="0.5", linewidth=0.6, zorder=0.9)
    if visible:
        axes[0].set_ylim(visible)
    return axes


def draw_curves(axes: Any, curves: Sequence[Curve], label: str, style: Mapping[str, Any]) -> None:
    """Draw the curves of one activation: their means, and bands where functions differ; thinner if they are several.

    Args:
        axes: As `draw_axes` returns them.
        curves: The curves.
        label: Entry of the legend; the number of channels is added to it if the curves are several.
        style: Properties of the lines, with their colour.
    """
    if len(curves) > 1:
        label, style = f"{label} ({len(curves)} channels)", {**style, "linewidth": 0.8}
    for index, curve in enumerate(curves):
        for axis, (low, mean, high) in zip(axes, (curve.values, curve.gradients), strict=True):
            axis.plot(curve.x, mean, label=label if index == 0 else None, **style)
            if curve.varies:
                axis.fill_between(curve.x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def sample_activation(spec: str, limits: tuple[float, float]) -> list[Curve]:
    """Return the curve of an activation at its initial parameters; of several channels if they start apart.

    Args:
        spec: Name or spec of the zoo.
        limits: Lowest and highest input.

    Raises:
        SpecError: The activation is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.create(spec, _CHANNELS)
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)) and not part.weight.any():
                part.reset_parameters()
        random = _is_random(module)
    return sample_curves(module, _CHANNELS, limits, most_channels=_DRAWN_CHANNELS, random=random)


@torch.no_grad()
def _is_random(module: nn.Module) -> bool:
    """Return whether a module in training mode returns something else each time."""
    inputs = torch.linspace(-2, 2, 2 * _CHANNELS * 9).view(2, _CHANNELS, 3, 3)
    return not torch.equal(module(inputs.clone()), module(inputs.clone()))
