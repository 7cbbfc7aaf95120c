"""Least-squares fits of an activation to a target curve, weighted by a standard normal input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rtdetr_act.activations.protocol import GRID

# Square roots of the weights, the density of a standard normal distribution, about that of a BatchNorm's output.
ROOT_WEIGHTS = torch.exp(-(GRID**2) / 4)

Bounds = Sequence[float]


def relative_error(curve: Tensor, target: Tensor) -> float:
    """Return the weighted RMS of `curve - target` relative to that of `target`, or absolute if `target` is 0.

    Args:
        curve: Values on `GRID`, (1201,).
        target: Values on `GRID`, (1201,).

    >>> relative_error(torch.relu(GRID), torch.relu(GRID))
    0.0
    """
    norm = (target * ROOT_WEIGHTS).norm().item()
    error = ((curve - target) * ROOT_WEIGHTS).norm().item()
    return error / norm if norm else error


def fit_slopes(target: Tensor) -> tuple[float, float]:
    """Fit one line through 0 to the positive half of a curve and one to the negative half, and return their slopes.

    Args:
        target: Values of the curve on `GRID`, (1201,).

    Returns:
        The positive and the negative slope.

    >>> fit_slopes(torch.relu(GRID))
    (1.0, 0.0)
    """
    weights = ROOT_WEIGHTS**2 * GRID
    positive, negative = (
        float((weights * target)[side].sum() / (weights * GRID)[side].sum()) for side in (GRID > 0, GRID < 0)
    )
    return positive, negative


def fit_curve(
    curve: Callable[..., Tensor], target: Tensor, start: Sequence[float], low: Bounds, high: Bounds
) -> tuple[tuple[float, ...], Tensor]:
    """Return the parameters within bounds whose curve is closest to a target, and that curve.

    Results are cached: a network has dozens of sites, but only a few different ones.

    Args:
        curve: Maps scalar parameters to values on `GRID`, (1201,) in float64. Pass a module-level function, which the
            cache recognises.
        target: Values on `GRID`, (1201,) in float64.
        start: Initial parameters.
        low: Lower bounds of the parameters.
        high: Upper bounds of the parameters.

    Returns:
        The parameters, and the curve (1201,) in float64.
    """
    parameters, values = _fit_curve(curve, tuple(target.tolist()), tuple(start), tuple(low), tuple(high))
    return parameters, torch.tensor(values, dtype=torch.float64)


@lru_cache(maxsize=256)
def _fit_curve(
    curve: Callable[..., Tensor], target: tuple[float, ...], start: Bounds, low: Bounds, high: Bounds
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from scipy.optimize import least_squares  # takes 0.3 s to import

    y = torch.tensor(target, dtype=torch.float64)

    def residuals(parameters: Sequence[float]) -> Tensor:
        return (curve(*torch.as_tensor(parameters)) - y) * ROOT_WEIGHTS

    solution = least_squares(
        lambda p: residuals(p).numpy(), start, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12
    ).x
    # Keep a start that fits exactly: the numerical derivative at a kink would move away from it.
    if residuals(start).abs().max() < 1e-9:
        solution = start
    return tuple(map(float, solution)), tuple(curve(*torch.as_tensor(solution, dtype=torch.float64)).tolist())
