"""Scale the inputs and outputs of activations without parameters to match the activations that they replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery import scales
from rtdetr_act.surgery.modules import find_frozen, get_named_tensors
from rtdetr_act.surgery.site_samples import SiteSample
from rtdetr_act.surgery.sites import Site, find_sites, iterate_placed_activations

# Bounds of the factor on the input: hardswish(100 x) is a ReLU in effect, not the activation that was asked for, but
# relu6(x / 20) is what a network without BatchNorm needs whose values go up to 100.
_MIN_GAIN, _MAX_GAIN = 1 / 32, 2.0
# A factor must reduce the error to less than this ratio. The few large values that ReLU6 cuts off are what objects are
# found by: with 0.9, yolo11n with ReLU6 loses 3.4 % of its mAP on BCCD, with 0.99 it loses 2.5 %.
_MAX_ERROR_RATIO = 0.99
_MAX_VALUES = 4096  # of a sample, that find the factor


@dataclass(frozen=True)
class Rescaling:
    """What `rescale` did.

    Attributes:
        sites: The names of the scaled activations.
        outputs: The factor on the output of each layer, by the name of its weight; 1 where it is missing.
    """

    sites: tuple[str, ...] = ()
    outputs: Mapping[str, float] | None = None

    def output_factor(self, weight: str) -> float:
        """Return the factor on the output of a layer, by the name of its weight."""
        return (self.outputs or {}).get(weight, 1.0)


def find_gain(activation: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the factors (c, a) for which `a * activation(c * x)` is closest to a target.

    The fit is by least squares, with c between 1/32 and 2. If it reduces the error by less than 1 %, (1, 1) is
    returned.

    Args:
        activation: The new activation, which must be elementwise.
        x: Inputs that its site gets, of any shape.
        target: The outputs there of the activation that it replaces, of the same shape.

    >>> x = torch.linspace(-3, 3, 601)
    >>> c, a = find_gain(nn.GELU(), x, nn.SiLU()(x))
    >>> round(c, 1), round(a, 1)  # GELU is nearly SiLU of 1.7 x, divided by that
    (0.6, 1.7)
    >>> find_gain(nn.ReLU(), x, nn.SiLU()(x))
    (1.0, 1.0)
    """
    from scipy.optimize import minimize_scalar

    def fit(exponent: float) -> tuple[float, float]:
        y = activation(x * math.exp(exponent))
        square = float((y * y).sum())
        factor = float((target * y).sum()) / square if square else 0.0
        return factor, float((factor * y - target).norm())

    low, high = math.log(_MIN_GAIN), math.log(_MAX_GAIN)
    # The error may have several minima, of which a bounded search finds any: so it starts from a coarse grid.
    steps = 13
    grid = [low + (high - low) * step / (steps - 1) for step in range(steps)]
    errors = [fit(exponent)[1] for exponent in grid]
    at = min(range(steps), key=errors.__getitem__)
    bounds = grid[max(at - 1, 0)], grid[min(at + 1, steps - 1)]
    best = float(minimize_scalar(lambda exponent: fit(exponent)[1], bounds=bounds, method="bounded").x)
    factor, error = fit(best)
    if factor <= 0 or not error < _MAX_ERROR_RATIO * fit(0.0)[1]:
        return 1.0, 1.0
    return math.exp(best), factor


@torch.no_grad()
def rescale(root: nn.Module, samples: Mapping[str, SiteSample], images: Tensor) -> Rescaling:
    """Fold the factors of `find_gain` into the weights before and after each swapped activation, in place.

    The network is run once to find where that is possible: the operands of a sum must have the same scale, and
    nonlinear operators, such as attention, must keep theirs. Activations with parameters are not scaled, since those
    are fitted. If a frozen layer would have to change, nothing is scaled.

    Args:
        root: The patched network.
        samples: What the activations that were replaced get and return, as `sample_sites` returns it.
        images: Inputs to run the network on, (B, C, H, W).
    """
    requirements: dict[str, scales.Requirement] = {}
    for site in find_sites(root, images):
        if _has_fixed_form(site) and (sample := samples.get(site.name)):
            x, y = (value.flatten().double() for value in (sample.inputs, sample.outputs))
            step = len(x) // _MAX_VALUES | 1  # odd, so that it takes from all columns of a map
            c, a = find_gain(site.module, x[::step], y[::step])
            if c != 1:
                requirements[site.name] = c, 1 / a
    if not requirements:
        return Rescaling()
    flow = scales.record(root, requirements, (images,))
    solution = scales.solve(flow, requirements)
    tensors = get_named_tensors(root)
    placed = {id(parameter) for _, module in iterate_placed_activations(root) for parameter in module.parameters()}
    frozen = find_frozen(parameter for parameter in root.parameters() if id(parameter) not in placed)
    if any(id(tensors[name]) in frozen for name in solution.factors):
        return Rescaling()
    for name, factor in solution.factors.items():
        tensors[name].mul_(factor)
    return Rescaling(tuple(solution.sides), solution.outputs)


def _has_fixed_form(site: Site) -> bool:
    """Return whether a site holds a swapped activation without parameters."""
    activation = site.module
    return get_placement(activation) is not None and not any(True for _ in activation.parameters()) and not site.hidden
