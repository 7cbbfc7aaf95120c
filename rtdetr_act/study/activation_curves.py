"""What activations learned, as curves: a report shows them before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rtdetr_act.surgery.sites import MARK, find_sites
from rtdetr_act.surgery.tracing import trace

_LIMIT, _POINTS = 4.0, 65


def sample_learned_curves(model: nn.Module) -> dict[str, Any]:
    """Return the curves of the learnable activations that a swap placed, as plain data.

    What depends on more than the one value is drawn as the median over eight random inputs.

    Args:
        model: A task model, RTDETR or YOLO object.

    Returns:
        {"x": values of the axis, "sites": {qualified name: {"activation": class, "curve": f(x)}}}.
    """
    x = torch.linspace(-_LIMIT, _LIMIT, _POINTS)
    curves = {}
    for site in find_sites(model):
        module = site.activation
        if not hasattr(module, MARK) or not site.channels or next(module.parameters(), None) is None:
            continue
        curve = [round(value, 4) for value in trace(module, x, site.channels, site.layout).tolist()]
        curves[site.name] = {"activation": type(module).__name__, "curve": curve}
    return {"x": [round(value, 4) for value in x.tolist()], "sites": curves}
