"""Checks of the arguments of activations.

Feature maps ("map") are (B, C, H, W) with the channels at dimension 1; tokens are (B, N, C) or (B, C), channels last.
"""

from __future__ import annotations

import math

import torch

from rtdetr_act.activations.protocol import LAYOUTS, Layout
from rtdetr_act.errors import quote


def channel_dim(layout: Layout) -> int:
    """Return the channel dimension of a layout: 1 for "map", -1 for "tokens"; ValueError for any other.

    >>> channel_dim("map"), channel_dim("tokens")
    (1, -1)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is 'map' or 'tokens', not {quote(layout)}")
    return 1 if layout == "map" else -1


def check_count(name: str, value: int, at_least: int = 1) -> int:
    """Return `value` if it is an integer of at least `at_least`, else raise ValueError naming it.

    >>> check_count("channels", 0)
    Traceback (most recent call last):
    ValueError: channels is an integer of at least 1, not 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is an integer of at least {at_least}, not {quote(value)}")
    return value


def check_finite(name: str, value: float) -> float:
    """Return `value` as a float that is finite in float32, else raise ValueError naming it.

    >>> check_finite("beta", 2)
    2.0
    """
    number = _as_float(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} is a finite number in float32, not {quote(value)}")
    return number


def check_positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` as a finite positive float (zero too with `or_zero`), else raise ValueError naming it.

    >>> check_positive("tau", 10)
    10.0
    """
    number = _as_float(value)
    if number is None or not (0 < number < math.inf or (or_zero and number == 0)):
        raise ValueError(f"{name} is a {'non-negative' if or_zero else 'positive'} number, not {quote(value)}")
    return number


def _as_float(value: object) -> float | None:
    """Return a number as a float, one beyond float32 as an infinity, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) > torch.finfo(torch.float32).max:  # before float(), which refuses integers of more than 1024 bits
        return math.copysign(math.inf, 1 if value > 0 else -1)
    return float(value)
