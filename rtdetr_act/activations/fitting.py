"""Least squares between the curve of an activation and another one, under a normal input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rtdetr_act.activations.protocol import GRID

# Square roots of the weights of a normal input with mean 0 and variance 1, as BatchNorm makes it.
ROOT_WEIGHTS = torch.exp(-(GRID**2) / 4)

Bounds = Sequence[float]


def relative_error(curve: Tensor, target: Tensor) -> float:
    """Return the root mean square of `curve - target` over that of `target`, both (1201,) on `GRID`.

    >>> relative_error(torch.relu(GRID), torch.relu(GRID))
    0.0
    """
    norm = (target * ROOT_WEIGHTS).norm().item()
    error = ((curve - target) * ROOT_WEIGHTS).norm().item()
    return error / norm if norm else error


def best_slopes(target: Tensor) -> tuple[float, float]:
    """Return the best slope through 0 for positive and for negative inputs, of a curve (1201,) on `GRID`.

    >>> best_slopes(torch.relu(GRID))
    (1.0, 0.0)
    """
    weights = ROOT_WEIGHTS**2 * GRID
    above, below = (
        float((weights * target)[side].sum() / (weights * GRID)[side].sum()) for side in (GRID > 0, GRID < 0)
    )
    return above, below


def fit_curve(
    curve: Callable[..., Tensor], target: Tensor, start: Sequence[float], low: Bounds, high: Bounds
) -> tuple[tuple[float, ...], Tensor]:
    """Return the parameters between two bounds whose curve is closest to a target, and that curve.

    Args:
        curve: Maps the parameters, scalars, to values on `GRID`, (1201,) in float64. A function of a module, since
            its results are kept: a network has dozens of sites, but few kinds of them.
        target: (1201,) in float64.
        start: Where the search starts.
        low: Least values of the parameters.
        high: Greatest values of the parameters.
    """
    parameters, values = _fit_curve(curve, tuple(target.tolist()), tuple(start), tuple(low), tuple(high))
    return parameters, torch.tensor(values, dtype=torch.float64)


@lru_cache(maxsize=256)
def _fit_curve(
    curve: Callable[..., Tensor], target: tuple[float, ...], start: Bounds, low: Bounds, high: Bounds
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from scipy.optimize import least_squares  # 0.3 s, which nothing else here needs

    y = torch.tensor(target, dtype=torch.float64)

    def residuals(parameters: Sequence[float]) -> Tensor:
        return (curve(*torch.as_tensor(parameters)) - y) * ROOT_WEIGHTS

    found = least_squares(
        lambda p: residuals(p).numpy(), start, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12
    ).x
    # An exact start stays: a numerical derivative at a kink would leave it.
    if residuals(start).abs().max() < 1e-9:
        found = start
    return tuple(map(float, found)), tuple(curve(*torch.as_tensor(found, dtype=torch.float64)).tolist())
