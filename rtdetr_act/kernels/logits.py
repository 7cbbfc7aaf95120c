"""A 1x1 convolution to a single channel: the logits of the spatial attention of DY-ReLU-C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rtdetr_act.kernels.backend import compute_dtype, differentiable_grad, is_exporting, needs_autograd, needs_plain_ops
from rtdetr_act.kernels.blocks import empty_like, make_dense
from rtdetr_act.kernels.recomputable import recomputable


@recomputable
def compute_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a 1x1 convolution with one output channel: `sum_c weight[c] * x[:, c] + bias`.

    It is computed as a vector-matrix product per image. Convolution kernels are optimised for many output channels: on
    4x64x80x80 and two cores torch's takes 0.75 ms forward and 5.5 ms backward, this one 0.07 and 0.4 ms.

    Args:
        x: (B, C, H, W).
        weight: (1, C, 1, 1).
        bias: (1,).

    Returns:
        (B, 1, H, W), in float32 for half types, else in the dtype of x.

    >>> compute_logits(torch.ones(1, 4, 2, 2), torch.full((1, 4, 1, 1), 0.5), torch.ones(1)).flatten()
    tensor([3., 3., 3., 3.])
    """
    if needs_plain_ops(x):
        return plain(x, weight, bias)
    return _Logits.apply(x, weight, bias) if needs_autograd(x, weight, bias) else _forward(x, weight, bias)


def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    """Return the weighted sum over channels, `sum_c factors[c] * x[:, c]`.

    Args:
        x: (B, C, H, W), dense.
        factors: (C,), in the dtype of x.

    Returns:
        (B, 1, H, W), in the dtype of x.

    >>> weighted_sum(torch.ones(1, 4, 1, 2), torch.ones(4))
    tensor([[[[4., 4.]]]])
    """
    images, channels, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):  # which would compute the product in a half type
        sums = torch.bmm(factors.view(1, 1, channels).expand(images, 1, channels), flatten_positions(x))
    return sums.view(images, 1, height, width)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `compute_logits` in torch's own differentiable operators."""
    if torch.compiler.is_compiling() and not is_exporting():
        # A compiler calls a library for a convolution, and fuses a sum with what is before and behind it: DY-ReLU-C,
        # forward and backward on two cores, takes 2.9 to 3.0 times as long as SiLU, with a convolution 7.8 to 10.5.
        computed = compute_dtype(x.dtype)
        return (x.to(computed) * weight.to(computed)).sum(1, keepdim=True) + bias.to(computed)
    z = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))
    return z.to(compute_dtype(z.dtype))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable_grad(plain, (x, weight, bias), grad, ctx.needs_input_grad))
        source = make_dense(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = flatten_positions(source).to(grad.dtype)
            for_weight = torch.bmm(grad.flatten(2), rows.transpose(1, 2)).sum(0).view(weight.shape).to(weight.dtype)
        grad_x = empty_like(source)
        if grad_x.dtype == grad.dtype:
            torch.mul(grad, weight.to(grad.dtype), out=grad_x)
        else:
            grad_x.copy_(grad * weight.to(grad.dtype))
        return grad_x, for_weight, grad.sum().view(1).to(bias.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    computed = compute_dtype(x.dtype)
    return weighted_sum(make_dense(x).to(computed), weight.to(computed).flatten()).add_(bias.to(computed))


def flatten_positions(x: Tensor) -> Tensor:
    """Return a view (B, C, H * W) of dense (B, C, H, W) maps, contiguous or channels_last."""
    return x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)
