"""What needs to know where the channels are: PReLU and the softmaxes; and checks of arguments.

Feature maps ("map") are (B, C, H, W) with the channels at dimension 1; tokens are (B, N, C) or (B, C), channels last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.entry import LAYOUTS
from rtdetr_act.errors import SelectionError, SpecError, quote
from rtdetr_act.kernels import prelu as ops


class PReLU(nn.PReLU):
    """`torch.nn.PReLU` with the backward of `rtdetr_act.kernels.prelu`, and with the channels wherever they are.

    torch's own takes 3 to 6 times a SiLU on a CPU, this one 1.3, or 2 with a slope per channel; and it takes
    dimension 1 for the channels, which counts the queries in (B, N, C).

    Shapes: (B, C, ...), or (..., C) with layout "tokens", to the same; `weight` is (num_parameters,), 1 or C.

    Args:
        num_parameters: 1 by default, or the number of channels.
        init: Start of the slopes, 0.25 by default.
        device: Of the slopes.
        dtype: Of the slopes.
        layout: "map" (default) or "tokens".

    Paper: He et al., arXiv:1502.01852.

    >>> import torch
    >>> PReLU(4, layout="tokens")(-torch.ones(2, 3, 4))[0, 0].detach()
    tensor([-0.2500, -0.2500, -0.2500, -0.2500])
    """

    def __init__(
        self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: Any = None, *, layout: str = "map"
    ) -> None:
        channel_dim(layout)
        super().__init__(num_parameters, init, device, dtype)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Return x where it is positive, weight * x elsewhere."""
        return ops.prelu(x, self.weight, self.layout)


def prelu(
    num_parameters: int = 1,
    init: float = 0.25,
    device: Any = None,
    dtype: Any = None,
    *,
    per_channel: bool = False,
    channels: int | None = None,
    layout: str = "map",
) -> PReLU:
    """Build a PReLU with one slope, or with one slope per channel wherever the channels are.

    Takes the arguments of `torch.nn.PReLU`, and `per_channel=True` for as many slopes as the site has channels.
    He et al., arXiv:1502.01852.

    Raises:
        ValueError: `num_parameters` is below 1 or `init` is not a finite number.
        SpecError: `per_channel` without a number of channels.
        SelectionError: The site has another number of channels than `num_parameters`.

    >>> prelu()
    PReLU(num_parameters=1)
    >>> prelu(per_channel=True, channels=64, layout="tokens")
    PReLU(num_parameters=64)
    """
    count = check_count("num_parameters", num_parameters)
    if per_channel and count == 1:
        if channels is None:
            raise SpecError("'prelu(per_channel=True)' needs the number of channels: give channels=, such as 64")
        count = channels
    if count != 1 and channels is not None and count != channels:
        raise SelectionError(f"'prelu(num_parameters={count})' cannot stand where there are {channels} channels")
    return PReLU(count, check_finite("init", init), device, dtype, layout=layout)


def softmax(dim: int | None = None, *, layout: str = "map") -> nn.Softmax:
    """Build a softmax over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> softmax(), softmax(layout="tokens")
    (Softmax(dim=1), Softmax(dim=-1))
    """
    return nn.Softmax(dim=channel_dim(layout) if dim is None else dim)


def softmin(dim: int | None = None, *, layout: str = "map") -> nn.Softmin:
    """Build a softmin over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> softmin()
    Softmin(dim=1)
    """
    return nn.Softmin(dim=channel_dim(layout) if dim is None else dim)


def log_softmax(dim: int | None = None, *, layout: str = "map") -> nn.LogSoftmax:
    """Build a log-softmax over the channels (dimension 1 of maps, the last one of tokens) or over `dim` where given.

    >>> log_softmax(layout="tokens")
    LogSoftmax(dim=-1)
    """
    return nn.LogSoftmax(dim=channel_dim(layout) if dim is None else dim)


def channel_dim(layout: str) -> int:
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
