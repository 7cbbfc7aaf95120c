"""GLU as a drop-in activation, preceded by the projection that it needs (Dauphin et al., arXiv:1612.08083)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import channel_dim, check_count, check_map
from rtdetr_act.activations.protocol import Entry, Layout
from rtdetr_act.kernels.backend import compute_dtype, differentiable_grad, needs_autograd, needs_plain_ops
from rtdetr_act.kernels.blocks import empty_like
from rtdetr_act.kernels.recomputable import recomputable


class GatedLinearUnit(nn.Module):
    """Project C channels to 2C and gate one half by the sigmoid of the other: `a * sigmoid(b)`, `a, b = W x + c`.

    `torch.nn.GLU` halves the channels, so it cannot replace an activation on its own.

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W), projected by a 1x1 convolution of the positions as (B, C, 1, P),
    or (..., C) with layout "tokens", projected by a Linear; the output has the shape of the input.

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

    def __init__(self, channels: int, *, layout: Layout = "map") -> None:
        super().__init__()
        check_count("channels", channels)
        self.dim = channel_dim(layout)
        self.proj: nn.Module = (
            nn.Conv2d(channels, 2 * channels, 1) if layout == "map" else nn.Linear(channels, 2 * channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated projection of x, in the shape of x; raises ShapeError if x is not a map but should be."""
        if self.dim != 1:
            return glu(self.proj(x), self.dim)
        check_map(x)
        return glu(self.proj(x)) if x.ndim == 4 else glu(self.proj(_as_row(x))).reshape(x.shape)


def _as_row(x: Tensor) -> Tensor:
    """View (B, C, ...) as (B, C, 1, P); P last, where convolutions recognise channels_last_3d as channels_last."""
    return x.flatten(2).unsqueeze(2)


# ---------------------------------------------------------------- callbacks of the entry


class Gate(nn.Module):
    """An equivalent of `GatedLinearUnit` without the operator GLU, which returns NaN in NCNN.

    Args:
        activation: The module to convert, whose projection it shares.
    """

    def __init__(self, activation: GatedLinearUnit) -> None:
        super().__init__()
        self.proj, self.dim = activation.proj, activation.dim

    def forward(self, x: Tensor) -> Tensor:
        """Return one half times the sigmoid of the other."""
        if self.dim == 1 and x.ndim != 4:
            y: Tensor = self(_as_row(x))
            return y.reshape(x.shape)
        value, gate = self.proj(x).chunk(2, self.dim)
        return value * torch.sigmoid(gate)


# ---------------------------------------------------------------- op


@recomputable
def glu(x: Tensor, dim: int = 1) -> Tensor:
    """Return `a * sigmoid(b)` for the halves a, b of x along `dim`, in the dtype and memory format of x.

    It uses torch's kernels, which make one pass each way and save only x, except for the backward of channels_last
    maps: torch's returns a contiguous gradient and takes 7 to 13 times as long as SiLU on a CPU, this one 4 to 5 times.

    Args:
        x: Any shape with an even size along `dim`.
        dim: The channel dimension. Default: 1.

    Raises:
        RuntimeError: The size along `dim` is odd (raised by torch).

    Source: Dauphin et al., arXiv:1612.08083.

    >>> glu(torch.tensor([[2.0, 0.0]]))
    tensor([[1.]])
    """
    channels_last = x.ndim == 4 and dim == 1 and not x.is_contiguous()
    if needs_plain_ops(x) or not channels_last or not needs_autograd(x):
        return F.glu(x, dim)
    return _GLU.apply(x)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.glu(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_grad(lambda t: F.glu(t, 1), (x,), grad, (True,))[0]
        value, gate = (half.to(compute_dtype(x.dtype)) for half in x.chunk(2, 1))
        grad_x = empty_like(x)
        for_value, for_gate = grad_x.chunk(2, 1)
        open_gate = torch.sigmoid(gate)
        for_value.copy_(grad * open_gate)
        for_gate.copy_((value * grad).mul_(open_gate).mul_(1 - open_gate))
        return grad_x


ENTRIES = (
    Entry(
        "glu",
        GatedLinearUnit,
        "a·σ(b), (a, b) = W·x + c with W a 1×1 convolution C → 2C",
        "Dauphin et al., arXiv:1612.08083; torch.nn.GLU",
        exportable=Gate,
        use_when=(
            "To gate by what a 1x1 convolution computes, at the cost of that convolution, C to 2C channels, per site."
        ),
        title="GLU",
        start="a random projection of x and a random gate",
    ),
)
