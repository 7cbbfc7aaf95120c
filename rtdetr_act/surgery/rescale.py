"""Scale what activations without parameters read and give, so that they are closest to those they replace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery import scales
from rtdetr_act.surgery.modules import frozen_among, tensors_of
from rtdetr_act.surgery.sites import Site, find_sites, placed_activations
from rtdetr_act.surgery.tracing import trace

# Between these, factors on the input are tried: hardswish of 100 x is a ReLU, and no longer what was asked for.
_LEAST, _MOST = 0.5, 2.0
_WORTH = 0.9  # of the error as it is: a factor that leaves more is not worth it

_X = torch.linspace(-6 * _MOST, 6 * _MOST, 2401).double()
_WIDTH = float(_X[1] - _X[0])


def find_gain(activation: nn.Module, old: Callable[..., Any], channels: int | None) -> tuple[float, float]:
    """Return (c, a) with which `a * activation(c * x)` is closest to old(x).

    By least squares under a normal input, c between 1/2 and 2; (1, 1) where that gains little.

    >>> c, a = find_gain(nn.GELU(), nn.SiLU(), 8)
    >>> round(c, 1), round(a, 1)  # GELU is nearly SiLU of 1.7 x, divided by that
    (0.6, 1.7)
    >>> find_gain(nn.ReLU(), nn.SiLU(), 8)
    (1.0, 1.0)
    """
    curves = (trace(f, _X.float(), channels).double() for f in (activation, old))
    return _solve(*(tuple(curve.tolist()) for curve in curves))


@lru_cache(maxsize=64)  # a network has dozens of sites, but few kinds of them
def _solve(new: tuple[float, ...], old: tuple[float, ...]) -> tuple[float, float]:
    from scipy.optimize import minimize_scalar

    inside = _X.abs() <= 6
    x, wanted = _X[inside], torch.tensor(old).double()[inside]
    weights = torch.exp(-(x**2) / 2)
    curve = torch.tensor(new).double()

    def fit(exponent: float) -> tuple[float, float]:
        places = (x * math.exp(exponent) - _X[0]) / _WIDTH
        left = places.long().clamp(0, len(_X) - 2)
        y = torch.lerp(curve[left], curve[left + 1], places - left)
        square = float((weights * y * y).sum())
        factor = float((weights * wanted * y).sum()) / square if square else 0.0
        return factor, float((weights * (factor * y - wanted) ** 2).sum()) ** 0.5

    best = float(minimize_scalar(lambda c: fit(c)[1], bounds=(math.log(_LEAST), math.log(_MOST)), method="bounded").x)
    factor, error = fit(best)
    if factor <= 0 or not error < _WORTH * fit(0.0)[1]:
        return 1.0, 1.0
    return math.exp(best), factor


@torch.no_grad()
def rescale(root: nn.Module, original: nn.Module, images: Tensor) -> list[str]:
    """Move the factors of `find_gain` into the weights before and behind each swapped activation, in place.

    That is done wherever the network allows it, as found by running it: sums need one scale on both sides, and what is
    not linear, such as an attention, keeps its own. Activations with parameters stay, since they have a fit of theirs;
    and so does all of a network where a frozen layer would have to take up a factor.

    Args:
        root: The swapped network.
        original: The network as it was.
        images: What to run it on, (B, C, H, W).

    Returns:
        The names of the activations that got factors.
    """
    sites = find_sites(root, images)
    before = {site.name: site.module for site in find_sites(original, images)}
    demands: dict[str, scales.Demand] = {}
    for site in sites:
        if _has_fixed_form(site) and site.layout == "map" and site.name in before:
            c, a = find_gain(site.module, before[site.name], site.channels)
            if c != 1:
                demands[site.name] = c, 1 / a
    if not demands:
        return []
    flow = scales.record(root, demands, (images,))
    solution = scales.solve(flow, demands)
    tensors = tensors_of(root)
    placed = {id(parameter) for _, module in placed_activations(root) for parameter in module.parameters()}
    frozen = frozen_among(parameter for parameter in root.parameters() if id(parameter) not in placed)
    if any(id(tensors[name]) in frozen for name in solution.factors):
        return []
    for name, factor in solution.factors.items():
        tensors[name].mul_(factor)
    return [*solution.sides]


def _has_fixed_form(site: Site) -> bool:
    activation = site.module
    return get_placement(activation) is not None and not any(True for _ in activation.parameters()) and not site.hidden
