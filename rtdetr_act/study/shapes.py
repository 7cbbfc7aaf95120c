"""What activations learned, as curves: a report shows them before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rtdetr_act.plot import embed
from rtdetr_act.sites import MARK, evaluating, find_sites

_CONTEXTS, _SIDE = 8, 3  # 51 sites of DY-ReLU-B take 0.6 s
_LIMIT, _POINTS = 4.0, 65


def trace_activations(model: nn.Module) -> dict[str, Any]:
    """Return the curves of the learnable activations that a swap placed, as plain data.

    What depends on more than the one value is drawn as the median over eight random inputs.

    Args:
        model: A task model, RTDETR or YOLO object.

    Returns:
        {"x": values of the axis, "sites": {qualified name: {"activation": class, "curve": f(x)}}}.
    """
    x = torch.linspace(-_LIMIT, _LIMIT, _POINTS)
    curves = {}
    with torch.random.fork_rng(), torch.no_grad():
        for site in find_sites(model):
            module = site.activation
            first = next(module.parameters(), None) if hasattr(module, MARK) else None
            if first is None or not site.channels:
                continue
            torch.manual_seed(0)
            inputs, place = embed(x, site.channels, _CONTEXTS, _SIDE)
            inputs = inputs.to(first.device, first.dtype)
            if site.layout != "map":
                inputs = inputs.flatten(2).transpose(1, 2)
                place = (place[0], place[2] * _SIDE + place[3], place[1])  # type: ignore[assignment]
            with evaluating(module):
                values = module(inputs)[place]
            middle = values.float().view(_CONTEXTS, -1).median(0).values
            curve = [round(value, 4) for value in middle.tolist()]
            curves[site.name] = {"activation": type(module).__name__, "curve": curve}
    return {"x": [round(value, 4) for value in x.tolist()], "sites": curves}
