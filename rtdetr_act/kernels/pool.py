"""Global average pooling with a gradient that is expanded from (B, C), not written out as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.backend import needs_autograd, needs_plain_ops
from rtdetr_act.kernels.blocks import as_map


def global_avg_pool(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean over all positions.

    Half types are accumulated in float32, explicitly so that an exported graph does it too: a float16 sum over 160x160
    positions overflows from a mean of 2.6 on. The backward of `Tensor.mean` writes a map that autograd then adds to
    another; here it is an expanded view.

    Args:
        x: (B, C, ...).
        dtype: Dtype of the result, that of the weights applied to it.

    Returns:
        (B, C).

    >>> global_avg_pool(torch.full((1, 2, 160, 160), 100.0, dtype=torch.float16), torch.float32)
    tensor([[100., 100.]])
    """
    x = as_map(x, "map")
    if needs_autograd(x) and not needs_plain_ops(x):
        return _Mean.apply(x, dtype)
    return plain(x, dtype)


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `global_avg_pool` in torch's own differentiable operators."""
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
        # Divided before the cast: in float16 a small gradient would underflow.
        share = (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return share[..., None, None].expand(ctx.shape), None
