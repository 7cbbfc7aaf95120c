"""Start an activation from the parameters with which it is closest to what it replaces (`init="match"`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations.acon import AconC
from rtdetr_act.activations.aglu import AGLU
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dyrelu import DyReLUA, DyReLUB, DyReLUC
from rtdetr_act.kernels.arelu import ALPHA_MAX, ALPHA_MIN
from rtdetr_act.surgery.tracing import trace

# A grid is enough: every activation is smooth but for a few kinks, and beyond six standard deviations nothing counts.
_X = torch.linspace(-6, 6, 1201).double()
_ROOT_WEIGHTS = torch.exp(-(_X**2) / 4)
# How much of the range of a squashed parameter the fit may use; at its very end no gradient would be left.
_RANGE = 0.95
_LEAST_BETA = math.log(0.05 / 0.95)  # AReLU's positive slope is 1.05 there, with a fifth of the largest gradient
_LARGEST_ACON_BETA = 10.0  # ACON with p1 = 1, p2 = 0 is then ReLU to 0.028 everywhere
_LEAST_LAMBDA, _LARGEST_KAPPA = 1e-3, 10.0  # well inside AGLU's clamp; it is then ReLU to 0.04 everywhere

Curve = tuple[float, ...]  # f on the grid


def match(activation: nn.Module, old: Callable[..., Any], channels: int | None, layout: str = "map") -> float | None:
    """Set the parameters of an activation to those closest to another one, in place.

    Closest is by least squares under a normal input, mean 0 and variance 1, as BatchNorm makes it. AReLU, PReLU,
    LeakyReLU (its constant slope), ACON-C, AGLU, its gate alone (`apa`) and Dynamic ReLU have such a start; every other
    activation stays as it is. Dynamic ReLU gets constant coefficients, from which its generator learns to depart; that
    of variant C counts a spatial attention of 1/3, where it starts.

    Args:
        activation: What is to stand at the site, new.
        old: What stood there: a module, or a function such as `F.relu`.
        channels: C at the site, where known.
        layout: "map" or "tokens".

    Returns:
        The root mean square of the difference over that of the old one, 0 for an exact start; None where the
        activation has no start to fit.

    >>> match(AReLU(), nn.ReLU(), 8) > 0.05, match(DyReLUB(8), nn.ReLU(), 8), match(nn.Mish(), nn.ReLU(), 8)
    (True, 0.0, None)
    """
    fit = next((fit for cls, fit in _FITS if isinstance(activation, cls)), _fit_apa if _is_apa(activation) else None)
    if fit is None:
        return None
    wanted = tuple(trace(old, _X.float(), channels, layout).double().tolist())
    found = torch.tensor(fit(activation, wanted), dtype=torch.float64)
    norm = (torch.tensor(wanted, dtype=torch.float64) * _ROOT_WEIGHTS).norm().item()
    error = ((found - torch.tensor(wanted, dtype=torch.float64)) * _ROOT_WEIGHTS).norm().item()
    return error / norm if norm else error


# Each sets the parameters and returns the curve that they give.


@torch.no_grad()
def _fit_arelu(activation: AReLU, wanted: Curve) -> Any:
    above, below = _two_slopes(wanted)
    beta = max(math.log((above - 1) / (2 - above)), _LEAST_BETA) if 1 < above < 2 else _LEAST_BETA
    beta = 4.0 if above >= 2 else beta
    alpha = min(max(below, ALPHA_MIN), ALPHA_MAX)
    activation.beta.fill_(beta)
    activation.alpha.fill_(alpha)
    return torch.where(_X > 0, (1 + torch.sigmoid(torch.tensor(beta))) * _X, alpha * _X).tolist()


@torch.no_grad()
def _fit_prelu(activation: nn.PReLU, wanted: Curve) -> Any:
    _, below = _two_slopes(wanted)
    activation.weight.fill_(below)
    return torch.where(_X > 0, _X, below * _X).tolist()


def _fit_leaky_relu(activation: nn.LeakyReLU, wanted: Curve) -> Any:
    _, below = _two_slopes(wanted)
    activation.negative_slope = below
    return torch.where(_X > 0, _X, below * _X).tolist()


@torch.no_grad()
def _fit_aconc(activation: AconC, wanted: Curve) -> Any:
    (p1, p2, beta), curve = _solve("acon", wanted, (1.0, 0.0, 1.0), (-3, -3, 0.1), (3, 3, _LARGEST_ACON_BETA))
    for parameter, value in ((activation.p1, p1), (activation.p2, p2), (activation.beta, beta)):
        parameter.fill_(value)
    return curve


def _fit_aglu(activation: AGLU, wanted: Curve) -> Any:
    return _fit_gate(activation, "aglu", wanted, (1.0, 1.0))  # SiLU


def _fit_apa(activation: Any, wanted: Curve) -> Any:
    return _fit_gate(activation, "apa", wanted, (0.5, 0.5))


@torch.no_grad()
def _fit_gate(activation: Any, kind: str, wanted: Curve, start: Sequence[float]) -> Any:
    (lambd, kappa), curve = _solve(kind, wanted, start, (_LEAST_LAMBDA, -_LARGEST_KAPPA), (10, _LARGEST_KAPPA))
    activation.lambd.fill_(lambd)
    activation.kappa.fill_(kappa)
    return curve


@torch.no_grad()
def _fit_dyrelu(activation: Any, wanted: Curve) -> Any:
    pi = 1 / 3 if isinstance(activation, DyReLUC) else 1.0
    wide, shift = _RANGE * activation.lambda_a, _RANGE * activation.lambda_b
    if activation.k < 2 or wide == 0 or shift == 0:
        return (torch.relu(_X) * pi).tolist()
    target = tuple(value / pi for value in wanted)
    low, high = (1 - wide, -wide, -shift, -shift), (1 + wide, wide, shift, shift)
    (a1, a2, b1, b2), curve = _solve("two lines", target, (1.0, 0.0, 0.0, 0.0), low, high)
    # The branches beyond the second change nothing: they are the second again.
    slopes = [(a1 - 1) / activation.lambda_a] + [a2 / activation.lambda_a] * (activation.k - 1)
    intercepts = [b1 / activation.lambda_b] + [b2 / activation.lambda_b] * (activation.k - 1)
    deltas = torch.tensor([*slopes, *intercepts], dtype=torch.float64)
    bias = (2 * torch.atanh(deltas)).repeat_interleave(activation.expand.bias.numel() // len(deltas))
    activation.expand.bias.copy_(bias)
    return [value * pi for value in curve]


def _is_apa(activation: nn.Module) -> bool:
    # Ultralytics' class, which is not imported for the question. Ours of that name has been found by then.
    return type(activation).__name__ == "AGLU"


_FITS: tuple[tuple[type, Callable[..., Any]], ...] = (
    (AReLU, _fit_arelu),
    (nn.PReLU, _fit_prelu),
    (nn.LeakyReLU, _fit_leaky_relu),
    (AconC, _fit_aconc),
    (AGLU, _fit_aglu),
    (DyReLUA, _fit_dyrelu),
    (DyReLUB, _fit_dyrelu),
    (DyReLUC, _fit_dyrelu),
)


def _two_slopes(wanted: Curve) -> tuple[float, float]:
    """Return the best slope through 0 for positive and for negative inputs."""
    y, weights = torch.tensor(wanted, dtype=torch.float64), _ROOT_WEIGHTS**2 * _X
    return tuple(float((weights * y)[side].sum() / (weights * _X)[side].sum()) for side in (_X > 0, _X < 0))  # type: ignore[return-value]


@lru_cache(maxsize=256)  # a network has dozens of sites, but few kinds of them
def _solve(
    kind: str, wanted: Curve, start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the parameters between two bounds whose curve is closest, and that curve."""
    from scipy.optimize import least_squares

    curve, y = _CURVES[kind], torch.tensor(wanted, dtype=torch.float64)

    def residuals(parameters: Any) -> Any:
        return ((curve(*torch.as_tensor(parameters)) - y) * _ROOT_WEIGHTS).numpy()

    found = least_squares(residuals, start, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12).x
    if abs(residuals(start)).max() < 1e-9:  # exactly there, which a numerical derivative at a kink would leave
        found = start
    return tuple(map(float, found)), tuple(curve(*torch.as_tensor(found, dtype=torch.float64)).tolist())


def _gate(lambd: torch.Tensor, kappa: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(kappa * _X - torch.log(lambd)) ** (1 / lambd)


_CURVES: dict[str, Callable[..., torch.Tensor]] = {
    "acon": lambda p1, p2, beta: (p1 - p2) * _X * torch.sigmoid(beta * (p1 - p2) * _X) + p2 * _X,
    "aglu": lambda lambd, kappa: _X * _gate(lambd, kappa),
    "apa": lambda lambd, kappa: _gate(lambd, kappa),
    "two lines": lambda a1, a2, b1, b2: torch.maximum(a1 * _X + b1, a2 * _X + b2),
}
