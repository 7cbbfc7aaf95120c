"""Scale the inputs and outputs of activations without parameters to match the activations that they replace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery import scales
from rtdetr_act.surgery.modules import find_frozen, get_named_tensors
from rtdetr_act.surgery.sites import Site, find_sites, iterate_placed_activations
from rtdetr_act.surgery.tracing import sample_curve

# Bounds of the factor on the input: hardswish(100 x) is a ReLU in effect, not the activation that was asked for.
_MIN_GAIN, _MAX_GAIN = 0.5, 2.0
_MAX_ERROR_RATIO = 0.9  # a factor must reduce the error to less than this ratio

_X = torch.linspace(-6 * _MAX_GAIN, 6 * _MAX_GAIN, 2401).double()
_STEP = float(_X[1] - _X[0])


def find_gain(activation: nn.Module, old: Callable[..., Any], channels: int | None) -> tuple[float, float]:
    """Return the factors (c, a) for which `a * activation(c * x)` is closest to `old(x)`.

    The fit is by least squares, weighted by a standard normal input, with c between 1/2 and 2. If it reduces the error
    by less than 10 %, (1, 1) is returned.

    Args:
        activation: The new activation.
        old: The activation that it replaces, a module or a function.
        channels: Number of channels at the site, None if unknown.

    >>> c, a = find_gain(nn.GELU(), nn.SiLU(), 8)
    >>> round(c, 1), round(a, 1)  # GELU is nearly SiLU of 1.7 x, divided by that
    (0.6, 1.7)
    >>> find_gain(nn.ReLU(), nn.SiLU(), 8)
    (1.0, 1.0)
    """
    curves = (sample_curve(f, _X.float(), channels).double() for f in (activation, old))
    return _fit_gain(*(tuple(curve.tolist()) for curve in curves))


@lru_cache(maxsize=64)  # a network has dozens of sites, but only a few different ones
def _fit_gain(new: tuple[float, ...], old: tuple[float, ...]) -> tuple[float, float]:
    """Return the factors of `find_gain` for two curves sampled at `_X`."""
    from scipy.optimize import minimize_scalar

    inside = _X.abs() <= 6
    x, target = _X[inside], torch.tensor(old).double()[inside]
    weights = torch.exp(-(x**2) / 2)
    curve = torch.tensor(new).double()

    def fit(exponent: float) -> tuple[float, float]:
        indices = (x * math.exp(exponent) - _X[0]) / _STEP
        left = indices.long().clamp(0, len(_X) - 2)
        y = torch.lerp(curve[left], curve[left + 1], indices - left)
        square = float((weights * y * y).sum())
        factor = float((weights * target * y).sum()) / square if square else 0.0
        return factor, float((weights * (factor * y - target) ** 2).sum()) ** 0.5

    best = float(
        minimize_scalar(lambda c: fit(c)[1], bounds=(math.log(_MIN_GAIN), math.log(_MAX_GAIN)), method="bounded").x
    )
    factor, error = fit(best)
    if factor <= 0 or not error < _MAX_ERROR_RATIO * fit(0.0)[1]:
        return 1.0, 1.0
    return math.exp(best), factor


@torch.no_grad()
def rescale(root: nn.Module, original: nn.Module, images: Tensor) -> list[str]:
    """Fold the factors of `find_gain` into the weights before and after each swapped activation, in place.

    The network is run once to find where that is possible: the operands of a sum must have the same scale, and
    nonlinear operators, such as attention, must keep theirs. Activations with parameters are not scaled, since they are
    fitted by `match`. If a frozen layer would have to change, nothing is scaled.

    Args:
        root: The patched network.
        original: The network before the swap.
        images: Inputs to run it on, (B, C, H, W).

    Returns:
        The names of the scaled activations.
    """
    sites = find_sites(root, images)
    before = {site.name: site.module for site in find_sites(original, images)}
    requirements: dict[str, scales.Requirement] = {}
    for site in sites:
        if _has_fixed_form(site) and site.layout == "map" and site.name in before:
            c, a = find_gain(site.module, before[site.name], site.channels)
            if c != 1:
                requirements[site.name] = c, 1 / a
    if not requirements:
        return []
    flow = scales.record(root, requirements, (images,))
    solution = scales.solve(flow, requirements)
    tensors = get_named_tensors(root)
    placed = {id(parameter) for _, module in iterate_placed_activations(root) for parameter in module.parameters()}
    frozen = find_frozen(parameter for parameter in root.parameters() if id(parameter) not in placed)
    if any(id(tensors[name]) in frozen for name in solution.factors):
        return []
    for name, factor in solution.factors.items():
        tensors[name].mul_(factor)
    return [*solution.sides]


def _has_fixed_form(site: Site) -> bool:
    """Return whether a site holds a swapped activation without parameters."""
    activation = site.module
    return get_placement(activation) is not None and not any(True for _ in activation.parameters()) and not site.hidden
