"""Initialise an activation with the parameters that are closest to the one it replaces (`init="match"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rtdetr_act.activations.fitting import relative_error
from rtdetr_act.activations.protocol import GRID, Layout
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.tracing import sample_curve


def match(module: nn.Module, old: Callable[..., Any], channels: int | None, layout: Layout = "map") -> float | None:
    """Fit the parameters of an activation to another activation, in place.

    The fit is by least squares, weighted by a standard normal input, which is about the output of a BatchNorm. It
    applies to activations whose entry has a `fit` callback, such as PReLU, LeakyReLU (its constant slope), PWLU and
    Dynamic ReLU; others are not changed.

    Args:
        module: The new activation.
        old: The activation that it replaces: a module, or a function such as `F.relu`.
        channels: Number of channels at the site, None if unknown.
        layout: "map" (default) or "tokens".

    Returns:
        The RMS of the difference relative to that of the old activation, 0 for an exact fit; None if the activation has
        no `fit` callback.

    Raises:
        ModelError: The old activation does not accept inputs of this layout.

    >>> from rtdetr_act import create
    >>> match(create("arelu"), nn.ReLU(), 8) > 0.05, match(create("dyrelu_b", 8), nn.ReLU(), 8)
    (True, 0.0)
    >>> match(nn.Mish(), nn.ReLU(), 8) is None
    True
    """
    entry = find_entry(module)
    if entry is None or entry.fit is None:
        return None
    target = sample_curve(old, GRID.float(), channels, layout).double()
    return relative_error(entry.fit(module, target), target)
