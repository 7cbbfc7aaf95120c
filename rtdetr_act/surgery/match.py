"""Start an activation from the parameters with which it is closest to what it replaces (`init="match"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rtdetr_act.activations.fitting import relative_error
from rtdetr_act.activations.protocol import GRID, Layout
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.tracing import trace


def match(module: nn.Module, old: Callable[..., Any], channels: int | None, layout: Layout = "map") -> float | None:
    """Set the parameters of an activation to those closest to another one, in place.

    Closest is by least squares under a normal input, mean 0 and variance 1, as BatchNorm makes it. AReLU, PReLU,
    LeakyReLU (its constant slope), ACON-C, AGLU, its gate alone (`apa`), Dynamic ReLU, and users' own that say how they
    are fitted have such a start; every other activation stays as it is.

    Args:
        module: The activation that is to stand at the site, new.
        old: The activation that stood there: a module, or a function such as `F.relu`.
        channels: C at the site, where known.
        layout: "map" or "tokens".

    Returns:
        The root mean square of the difference over that of the old one, 0 for an exact start; None where the
        activation has no start to fit.

    Raises:
        ModelError: The old activation takes no inputs of such a layout.

    >>> from rtdetr_act import create
    >>> match(create("arelu"), nn.ReLU(), 8) > 0.05, match(create("dyrelu_b", 8), nn.ReLU(), 8)
    (True, 0.0)
    >>> match(nn.Mish(), nn.ReLU(), 8) is None
    True
    """
    entry = find_entry(module)
    if entry is None or entry.fit is None:
        return None
    target = trace(old, GRID.float(), channels, layout).double()
    return relative_error(entry.fit(module, target), target)
