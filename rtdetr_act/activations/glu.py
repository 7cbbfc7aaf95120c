"""GLU as a drop-in: with the projection that it needs in front (Dauphin et al., arXiv:1612.08083)."""

from __future__ import annotations

from torch import Tensor, nn

from rtdetr_act.activations.channels import channel_dim, check_count
from rtdetr_act.kernels.glu import glu


class GatedLinearUnit(nn.Module):
    """Project C channels to 2C and gate one half by the sigmoid of the other: `a * sigmoid(b)`, `a, b = W x + c`.

    `torch.nn.GLU` halves the channels, so alone it cannot stand where an activation stood.

    Shapes: (B, C, H, W) with a 1x1 convolution, or (..., C) with a Linear for layout "tokens", to the same.

    Args:
        channels: C.
        layout: "map" (default) or "tokens".

    Raises:
        ValueError: `channels` is below 1 or `layout` is unknown.

    Paper: Dauphin et al., arXiv:1612.08083.

    >>> import torch
    >>> GatedLinearUnit(8, layout="tokens")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, channels: int, *, layout: str = "map") -> None:
        super().__init__()
        check_count("channels", channels)
        self.dim = channel_dim(layout)
        self.proj: nn.Module = (
            nn.Conv2d(channels, 2 * channels, 1) if layout == "map" else nn.Linear(channels, 2 * channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated half, in the shape of x."""
        return glu(self.proj(x), self.dim)
