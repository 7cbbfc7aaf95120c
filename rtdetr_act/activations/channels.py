"""What needs to know where the channels are: pooling, shapes of coefficients, and torch's own with a channel dimension.

Feature maps ("map") are (B, C, H, W) with the channels at dimension 1; tokens are (B, N, C) or (B, C), channels last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.entry import LAYOUTS
from rtdetr_act.errors import SelectionError, SpecError


class TokenPReLU(nn.PReLU):
    """PReLU with one slope per channel where the channels are the last dimension.

    `torch.nn.PReLU` takes dimension 1 for the channels, which counts the queries in (B, N, C).

    Shapes: (..., C) to the same; `weight` is (C,). The slope starts at 0.25. He et al., arXiv:1502.01852.

    >>> TokenPReLU(4)(-torch.ones(2, 3, 4))[0, 0].detach()
    tensor([-0.2500, -0.2500, -0.2500, -0.2500])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x where it is positive, weight * x elsewhere."""
        # Transposed views cost no pass: the kernel keeps the strides of its input.
        return F.prelu(x.transpose(1, -1), self.weight).transpose(1, -1)


def prelu(
    num_parameters: int = 1,
    init: float = 0.25,
    device: Any = None,
    dtype: Any = None,
    *,
    per_channel: bool = False,
    channels: int | None = None,
    layout: str = "map",
) -> nn.PReLU:
    """Build a PReLU with one slope, or with one slope per channel wherever the channels are.

    Takes the arguments of `torch.nn.PReLU`, and `per_channel=True` for as many slopes as the site has channels.
    He et al., arXiv:1502.01852.

    Raises:
        SpecError: `per_channel` without a number of channels.
        SelectionError: The site has another number of channels than `num_parameters`.

    >>> prelu()
    PReLU(num_parameters=1)
    >>> prelu(per_channel=True, channels=64, layout="tokens")
    TokenPReLU(num_parameters=64)
    """
    count = check_count("num_parameters", num_parameters)
    if per_channel and count == 1:
        if channels is None:
            raise SpecError("'prelu(per_channel=True)' needs the number of channels: give channels=, such as 64")
        count = channels
    if count != 1 and channels is not None and count != channels:
        raise SelectionError(f"'prelu(num_parameters={count})' cannot stand where there are {channels} channels")
    build = TokenPReLU if layout == "tokens" and count > 1 else nn.PReLU
    return build(count, init, device, dtype)


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
        raise ValueError(f"layout is 'map' or 'tokens', not {layout!r}")
    return 1 if layout == "map" else -1


def over_channels(coefficients: Tensor, layout: str) -> Tensor:
    """View (C,) or (B, C) coefficients so that they broadcast over (B, C, H, W); those of tokens stay as they are.

    >>> over_channels(torch.zeros(8), "map").shape
    torch.Size([8, 1, 1])
    """
    return coefficients[..., None, None] if layout == "map" else coefficients


def mean_over_positions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pool (B, C, H, W) to (B, C) of `dtype`, the type of the weights that read it.

    Half types are summed in float32, in an exported graph too, where nothing else says so: a float16 sum over 160x160
    positions overflows from a mean of 2.6 on.

    >>> mean_over_positions(torch.full((1, 2, 160, 160), 100.0, dtype=torch.float16), torch.float32)
    tensor([[100., 100.]])
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.mean((2, 3), dtype=torch.float32 if half else None).to(dtype)


def check_count(name: str, value: int, at_least: int = 1) -> int:
    """Return `value` if it is an integer of at least `at_least`, else raise ValueError naming it.

    >>> check_count("channels", 0)
    Traceback (most recent call last):
    ValueError: channels is an integer of at least 1, not 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is an integer of at least {at_least}, not {value!r}")
    return value


def check_positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` as a finite positive float (zero too with `or_zero`), else raise ValueError naming it.

    >>> check_positive("tau", 10)
    10.0
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < float("inf") or (or_zero and value == 0)):
        raise ValueError(f"{name} is a {'non-negative' if or_zero else 'positive'} number, not {value!r}")
    return float(value)
