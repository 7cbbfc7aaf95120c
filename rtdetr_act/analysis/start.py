"""Describe what the initial parameters of an activation make it: another activation, two slopes, or a random curve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations import registry, torch_native
from rtdetr_act.activations.protocol import GRID
from rtdetr_act.surgery.tracing import embed_values

FIXED = "fixed"
_X = GRID[::25]  # -6, -5.75, … 6, exact in float32 too
_CHANNELS, _CONTEXTS, _SIZE = 8, 3, 3
_ROUNDING = 1e-9  # in float64
_CLOSE = 0.1  # the largest difference on _X at which another activation is named


def describe_start(name: str) -> str:
    """Return what the initial parameters of an activation make it, in a few words.

    That is what its entry says under `start`, or else what its curve at construction is: torch's own activation of
    which it differs nowhere on -6..6 ("silu exactly"), two slopes, or the activation that it is close to.

    Args:
        name: Name of a registered activation.

    Returns:
        The description: "fixed" for an activation without parameters, and "" if nothing is known, because it has
        arguments without defaults, its initial parameters are random, or its output depends on the whole input.

    Raises:
        SpecError: No activation has this name.

    >>> [describe_start(name) for name in ("silu", "aglu", "dyrelu_b", "arelu")]
    ['fixed', 'silu exactly', 'relu exactly', 'slopes 1.88 and 0.90']
    """
    entry = registry.get_entry(name)
    return entry.start or find_start(entry.name)


def find_start(name: str) -> str:
    """Return what `describe_start` finds out from the curve of an activation, whatever its entry says.

    Args:
        name: Name of a registered activation.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            module = _build(name, seed=0)
            if not any(True for _ in module.parameters()):
                return FIXED
            values, others = _sample(module), _sample(_build(name, seed=1))
        except Exception:  # a registered factory, or its module's forward, may raise anything
            return ""
    return _describe_curve(values, others)


def _build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return registry.create(name, _CHANNELS).double().eval()


@torch.no_grad()
def _sample(module: nn.Module) -> Tensor:
    """Return f(x) on `_X` in several random inputs and channels, (contexts, N)."""
    torch.manual_seed(0)
    inputs, place = embed_values(_X.float(), _CHANNELS, _CONTEXTS, _SIZE)
    values: Tensor = module(inputs.double())[place]
    return values.view(_CONTEXTS, -1)


def _describe_curve(values: Tensor, others: Tensor) -> str:
    """Describe the curve of an activation from its values with two seeds, each (contexts, N)."""
    curve = values[0]
    if not _equal(values, curve) or not _equal(others, curve):
        return ""
    if _equal(curve, _X):
        return "the identity"
    differences = {name: float((curve - other).abs().max()) for name, other in _sample_torch_native().items()}
    nearest = min(differences, key=differences.__getitem__)
    if differences[nearest] <= _ROUNDING:
        return f"{nearest} exactly"
    positive, negative = float(curve[-1] / _X[-1]), float(curve[0] / _X[0])
    if _equal(curve, torch.where(_X > 0, positive * _X, negative * _X)):
        return f"slopes {positive:.2f} and {negative:.2f}"
    return f"{nearest} within {differences[nearest]:.1g}" if differences[nearest] <= _CLOSE else ""


def _equal(values: Tensor, curve: Tensor) -> bool:
    return float((values - curve).abs().max()) <= _ROUNDING


def _sample_torch_native() -> dict[str, Tensor]:
    """Return the curves of torch's own elementwise activations that need no arguments, by name."""
    curves = {}
    for entry in torch_native.ENTRIES:
        module = entry.factory
        if isinstance(module, type) and entry.tokens and not _needs_arguments(entry.parameters):
            curves[entry.name] = module().double().eval()(_X)
    return curves


def _needs_arguments(parameters: dict) -> bool:
    return any(each.default is each.empty for each in parameters.values())
