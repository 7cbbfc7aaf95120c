"""ACON-C and Meta-ACON: activate or not, learned per channel (Ma et al., CVPR 2021, arXiv:2009.04759)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rtdetr_act.activations.channels import channel_dim, check_count
from rtdetr_act.errors import quote
from rtdetr_act.kernels.acon import acon
from rtdetr_act.kernels.pool import mean_over_positions

INITS = ("paper", "silu")


class AconC(nn.Module):
    """Switch smoothly between two linear functions per channel: `(p1 - p2) x * sigmoid(beta (p1 - p2) x) + p2 x`.

    Shapes: (B, C, H, W), or (..., C) with layout "tokens", to the same. `p1`, `p2` and `beta` are (C,).

    Args:
        channels: C.
        init: "paper" (default) draws p1 and p2 from N(0, 1) as the authors' code does, so that about every second
            channel starts with a negative slope: for training from scratch. "silu" starts at p1 = 1, p2 = 0, which is
            exactly SiLU: for a site of a pretrained network. beta starts at 1 in both.
        layout: "map" (default) or "tokens".

    Raises:
        ValueError: `channels` is below 1, or `init` or `layout` is unknown.

    Paper: Ma et al., CVPR 2021, arXiv:2009.04759.

    >>> x = torch.randn(2, 8, 3, 3)
    >>> torch.allclose(AconC(8, init="silu")(x), torch.nn.functional.silu(x), atol=1e-6)
    True
    """

    def __init__(self, channels: int, init: str = "paper", *, layout: str = "map") -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        channel_dim(layout)
        self.layout = layout
        self.p1, self.p2 = _start_slopes(channels, init)
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the type of x."""
        return acon(x, self.p1, self.p2, self.beta, self.layout)

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        return f"{self.channels}, layout={self.layout!r}"


class MetaAconC(nn.Module):
    """ACON-C whose beta comes from the pooled input: `beta = sigmoid(W2 (W1 mean(x) + b1) + b2)` per channel and image.

    The BatchNorms of the published network are left out: they fail at batch size 1, where a pooled channel is a
    single value, and make training unstable (YOLOv5 removed them too).

    Shapes: (B, C, H, W) to the same. `p1` and `p2` are (C,).

    Args:
        channels: C.
        reduction: R, the pooled C values go through max(C // R, R) as in the authors' code, 16 by default.
        init: "paper" (default) draws p1 and p2 from N(0, 1); "silu" starts at p1 = 1, p2 = 0.

    Raises:
        ValueError: A count is below 1 or `init` is unknown.

    Paper: Ma et al., CVPR 2021, arXiv:2009.04759.

    >>> MetaAconC(8)(torch.randn(1, 8, 1, 1)).shape
    torch.Size([1, 8, 1, 1])
    """

    def __init__(self, channels: int, reduction: int = 16, init: str = "paper") -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.reduction = check_count("reduction", reduction)
        hidden = max(channels // reduction, reduction)
        self.p1, self.p2 = _start_slopes(channels, init)
        self.squeeze = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, in the type of x."""
        return self.held_at(x)(x)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the elementwise function that stands at x: ACON with a beta held constant."""
        return partial(acon, p1=self.p1, p2=self.p2, beta=self.switch(x))

    def switch(self, x: Tensor) -> Tensor:
        """Return the beta of each image and channel, (B, C) in 0..1."""
        pooled = mean_over_positions(x, self.squeeze.weight.dtype)
        return torch.sigmoid(self.expand(self.squeeze(pooled)))

    def named_coefficients(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the input decides, by name: `beta`, (B, C)."""
        return {"beta": self.switch(x)}

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        return f"{self.channels}, reduction={self.reduction}"


def _start_slopes(channels: int, init: str) -> tuple[nn.Parameter, nn.Parameter]:
    if init not in INITS:
        raise ValueError(f"init is 'paper' or 'silu', not {quote(init)}")
    if init == "silu":
        return nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
    return nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))
