"""Validation of the arguments of activations.

Feature maps (layout "map") are (B, C, L), (B, C, H, W) or (B, C, D, H, W), with channels in dimension 1; tokens are
(B, N, C) or (B, C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rtdetr_act.activations.protocol import LAYOUTS, Layout
from rtdetr_act.errors import ShapeError, quote
from rtdetr_act.kernels.aten import is_tracing

# The shapes of feature maps by their number of spatial dimensions.
MAP_SHAPES = {1: "(B, C, L)", 2: "(B, C, H, W)", 3: "(B, C, D, H, W)"}


def channel_dim(layout: Layout) -> int:
    """Return the channel dimension of a layout: 1 for "map", -1 for "tokens"; raise ValueError for any other.

    >>> channel_dim("map"), channel_dim("tokens")
    (1, -1)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is 'map' or 'tokens', not {quote(layout)}")
    return 1 if layout == "map" else -1


def check_map(x: Tensor, channels: int | None = None, dims: int | None = None) -> None:
    """Raise ShapeError if x is not a feature map.

    Args:
        x: The input of an activation.
        channels: The number of channels that the activation was built for, None (default) for any.
        dims: The number of spatial dimensions that it was built for, None (default) for 1, 2 or 3.

    >>> check_map(torch.zeros(2, 8), 8)
    Traceback (most recent call last):
    rtdetr_act.errors.ShapeError: the input has the shape (2, 8): this activation takes (B, C, L), (B, C, H, W) or \
(B, C, D, H, W) with C = 8
    """
    fits = x.ndim - 2 in MAP_SHAPES if dims is None else x.ndim - 2 == dims
    # In a recorded graph, sizes are not plain numbers; there the weights of the activation raise an error of torch.
    if fits and (channels is None or torch.compiler.is_compiling() or is_tracing() or x.shape[1] == channels):
        return
    *others, last = MAP_SHAPES.values() if dims is None else [MAP_SHAPES[dims]]
    shapes = f"{', '.join(others)} or {last}" if others else last
    width = "" if channels is None else f" with C = {channels}"
    raise ShapeError(f"the input has the shape {tuple(x.shape)}: this activation takes {shapes}{width}")


def check_dims(dims: int) -> int:
    """Return a number of spatial dimensions if it is 1, 2 or 3, else raise ValueError.

    >>> check_dims(4)
    Traceback (most recent call last):
    ValueError: dims is 1, 2 or 3, not 4
    """
    if isinstance(dims, bool) or dims not in MAP_SHAPES:
        raise ValueError(f"dims is 1, 2 or 3, not {quote(dims)}")
    return dims


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
