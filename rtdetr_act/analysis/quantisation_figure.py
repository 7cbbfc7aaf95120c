"""Draw what INT8 costs in each layer of some networks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rtdetr_act.analysis.figures import TWO_COLUMNS, figure_style
from rtdetr_act.analysis.quantisation_error import QuantisationErrors

_MOST_LABELS = 40  # that can be read beside one another


@figure_style()
def draw_quantisation_errors(errors: Mapping[str, QuantisationErrors]) -> Figure:
    """Draw the ratio of signal to quantisation noise and the range of each layer's output, a line per network.

    Args:
        errors: Measurements of networks with the same layers, by the name of the network, the reference first.
    """
    layers = list(dict.fromkeys(layer for each in errors.values() for layer in each.by_layer()))
    figure = Figure(figsize=(TWO_COLUMNS, 5.0))
    above, below = figure.subplots(2, 1, sharex=True)
    for name, each in errors.items():
        found = each.by_layer()
        ratios = [found[layer].sqnr if layer in found else np.nan for layer in layers]
        widths = [found[layer].high - found[layer].low if layer in found else np.nan for layer in layers]
        above.plot(ratios, marker=".", label=name)
        below.plot(widths, marker=".", label=name)
    above.set(ylabel="SQNR of the output, dB")
    below.set(ylabel="range of the output", yscale="log", xlabel="layer")
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_minor_locator(NullLocator())
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    step = -(-len(layers) // _MOST_LABELS)
    labels = [layer.removeprefix("model.") for layer in layers[::step]]
    below.set_xticks(range(0, len(layers), step), labels, rotation=90)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=len(errors))
    return figure
