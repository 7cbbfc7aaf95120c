"""Draw the curves of the activations in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtdetr_act.analysis.figures import DPI, check_figure_path
from rtdetr_act.analysis.site_curves import plot_sites
from rtdetr_act.integrations.ultralytics.models import load_model


def plot_checkpoint(
    weights: str | Path,
    output: str | Path,
    *,
    xlim: Sequence[float] | None = None,
    ylim: Sequence[float] | None = None,
    dpi: int = DPI,
) -> Path:
    """Plot the activations at all sites of a checkpoint and their gradients, with what they learned.

    Args:
        weights: A .pt checkpoint.
        output: PNG, SVG or PDF file to write.
        xlim: As in `rtdetr_act.analysis.site_curves.plot_sites`, which says what is drawn.
        ylim: Likewise.
        dpi: Dots per inch of a PNG file. Default: 150.

    Returns:
        `output` as a path.

    Raises:
        InputError: The file does not exist, the figure cannot be written, or a number is out of range.
        ModelError: The file is not a checkpoint, or the model has no activation.
    """
    path = check_figure_path(output)
    return plot_sites(load_model(weights), path, xlim=xlim, ylim=ylim, dpi=dpi)
