"""The mean over positions, whose gradient is one number per row and need not be written out as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.backend import records, wants_plain


def mean_over_positions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pool (B, C, H, W) to (B, C) of `dtype`, the type of the weights that read it.

    Half types are summed in float32, in an exported graph too, where nothing else says so: a float16 sum over 160x160
    positions overflows from a mean of 2.6 on. torch's own backward writes a map to add it to another one; here it is
    an expanded view.

    >>> mean_over_positions(torch.full((1, 2, 160, 160), 100.0, dtype=torch.float16), torch.float32)
    tensor([[100., 100.]])
    """
    if records(x) and not wants_plain(x):
        return _Mean.apply(x, dtype)
    return plain(x, dtype)


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `mean_over_positions` in torch's own differentiable operators."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    mean = x.mean((2, 3), dtype=torch.float32) if half else x.mean((2, 3))
    return mean if mean.dtype == dtype else mean.to(dtype)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return plain(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Divided before the narrowing: a float16 would lose what is left of a small gradient.
        share = (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return share[..., None, None].expand(ctx.shape), None
