"""Validation of the arguments of activations.

Feature maps (layout "map") are (B, C, H, W), with channels in dimension 1; tokens are (B, N, C) or (B, C).
"""

from __future__ import annotations

import math

import torch

from rtdetr_act.activations.protocol import LAYOUTS, Layout
from rtdetr_act.errors import quote


def channel_dim(layout: Layout) -> int:
    """Return the channel dimension of a layout: 1 for "map", -1 for "tokens"; raise ValueError for any other.

    >>> channel_dim("map"), channel_dim("tokens")
    (1, -1)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is 'map' or 'tokens', not {quote(layout)}")
    return 1 if layout == "map" else -1


def check_count(name: str, value: int, at_least: int = 1) -> int:
    """Return `value` if it is an integer of at least `at_least`, else raise ValueError with the argument's name.

    >>> check_count("channels", 0)
    Traceback (most recent call last):
    ValueError: channels is an integer of at least 1, not 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is an integer of at least {at_least}, not {quote(value)}")
    return value


def check_finite(name: str, value: float) -> float:
    """Return `value` as a float if it is finite in float32, else raise ValueError with the argument's name.

    >>> check_finite("beta", 2)
    2.0
    """
    number = _as_float(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} is a finite number in float32, not {quote(value)}")
    return number


def check_positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` as a float if it is finite and positive, else raise ValueError with the argument's name.

    Args:
        name: Name of the argument.
        value: Its value.
        or_zero: Whether 0 is valid too. Default: False.

    >>> check_positive("tau", 10)
    10.0
    """
    number = _as_float(value)
    if number is None or not (0 < number < math.inf or (or_zero and number == 0)):
        raise ValueError(f"{name} is a {'non-negative' if or_zero else 'positive'} number, not {quote(value)}")
    return number


def _as_float(value: object) -> float | None:
    """Convert a number to a float, to an infinity if it is beyond float32; return None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) > torch.finfo(torch.float32).max:  # checked first: float() raises on integers of more than 1024 bits
        return math.copysign(math.inf, 1 if value > 0 else -1)
    return float(value)
