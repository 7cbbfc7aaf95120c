"""Curves of learned activations, which a report shows before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery.sites import find_sites
from rtdetr_act.surgery.tracing import sample_curve

_LIMIT, _POINTS = 4.0, 65


@dataclass(frozen=True)
class SampledCurves:
    """Curves of the learnable activations of a model.

    Attributes:
        x: Input values.
        classes: Class of each activation, by the qualified name of its site.
        values: Outputs of each activation at `x`, by the qualified name of its site.
    """

    x: list[float]
    classes: Mapping[str, str]
    values: Mapping[str, list[float]]


def sample_learned_curves(model: nn.Module) -> SampledCurves:
    """Return the curves of the learnable activations placed in a model, at 65 points over [-4, 4].

    An activation whose output depends on more than the element itself is sampled as the median over eight random
    inputs.

    Args:
        model: Task model, RTDETR or YOLO.
    """
    x = torch.linspace(-_LIMIT, _LIMIT, _POINTS)
    classes, values = {}, {}
    for site in find_sites(model):
        module = site.module
        if get_placement(module) is None or not site.channels or next(module.parameters(), None) is None:
            continue
        classes[site.name] = type(module).__name__
        values[site.name] = [
            round(value, 4) for value in sample_curve(module, x, site.channels, site.input_layout).tolist()
        ]
    return SampledCurves([round(value, 4) for value in x.tolist()], classes, values)
