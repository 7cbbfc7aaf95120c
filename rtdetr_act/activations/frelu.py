"""FReLU: the maximum of x and a spatial condition (Ma, Zhang & Sun, ECCV 2020, arXiv:2007.11824)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import check_count, check_dims, check_map
from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.aten import zero_unless_positive
from rtdetr_act.kernels.backend import (
    can_use_triton,
    constexpr,
    device_of,
    needs_autograd,
    needs_plain_ops,
    register_operator,
    tl,
    triton,
)
from rtdetr_act.kernels.blocks import empty_like, make_dense, match_layout
from rtdetr_act.kernels.maxima import compiled_maximum
from rtdetr_act.kernels.recomputable import recomputable


class FReLU(nn.Module):
    """Take the elementwise maximum of x and its funnel condition: `max(x, BN(DWConv3x3(x)))`.

    The depthwise convolution has no bias, which the BatchNorm would cancel.

    Shapes: (B, C, H, W) to the same; (B, C, L) with `dims=1`, (B, C, D, H, W) with `dims=3`.

    Args:
        channels: C.
        dims: Number of spatial dimensions: 1 for a kernel of 3, 2 (default) for 3x3, 3 for 3x3x3.

    Raises:
        ValueError: `channels` is below 1, or `dims` is not 1, 2 or 3.

    Paper: Ma et al., ECCV 2020, arXiv:2007.11824.

    >>> import torch
    >>> x = torch.randn(2, 8, 5, 5)
    >>> bool((FReLU(8)(x) >= x).all())
    True
    """

    dims = 2  # of modules in checkpoints from before there was a choice

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.dims = check_dims(dims)
        conv, norm = _LAYERS[dims]
        self.conv = conv(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, in the shape and dtype of x."""
        return self.held_at(x)(x)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the activation as an elementwise function, with the funnel condition at x held constant.

        Raises:
            ShapeError: x is not a feature map with C channels and `dims` spatial dimensions.
        """
        check_map(x, self.channels, self.dims)
        return partial(maximum, funnel=self._normalise(self.conv(x)))

    def _normalise(self, funnel: Tensor) -> Tensor:
        bn = self.bn
        if bn.training and funnel.numel() == funnel.shape[1]:
            # torch raises for a single value per channel, which has no variance: use the running statistics.
            return F.batch_norm(funnel, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        normalised: Tensor = bn(funnel)
        return normalised

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return f"{self.channels}" if self.dims == 2 else f"{self.channels}, dims={self.dims}"


_LAYERS: dict[int, tuple[type[Any], type[Any]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


# ---------------------------------------------------------------- op


@recomputable
def maximum(x: Tensor, funnel: Tensor) -> Tensor:
    """Return the elementwise maximum, in the dtype and memory format of x.

    The backward reads x and the output, which the neighbouring layers save anyway; `torch.maximum` also saves the
    funnel and computes a mask of ties. Ties pass the gradient to x.

    Args:
        x: Any shape.
        funnel: Same shape as x.

    Paper: Ma et al., ECCV 2020, arXiv:2007.11824.

    >>> maximum(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 3.])
    """
    if needs_plain_ops(x) or not needs_autograd(x, funnel):
        return plain(x, funnel)
    return _Maximum.apply(x, funnel)


def plain(x: Tensor, funnel: Tensor) -> Tensor:
    """Compute `maximum` in torch's own differentiable operators."""
    if torch.compiler.is_compiling():
        return compiled_maximum(funnel.to(x.dtype), x)
    return torch.maximum(x, funnel.to(x.dtype))


class _Maximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, funnel: Tensor) -> Tensor:
        y = plain(x, funnel)
        ctx.save_for_backward(x, y)
        ctx.dtype = funnel.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            is_funnel = (y > x).detach()  # a constant: the backward is linear in the gradient
            return torch.where(is_funnel, 0, grad), torch.where(is_funnel, grad, 0).to(ctx.dtype)
        if can_use_triton(x):
            return _triton_backward(grad, x, y, ctx.dtype)
        grad, margin = match_layout(grad, y), y - match_layout(x, y)
        grad_funnel = zero_unless_positive(grad, margin, margin)
        return grad - grad_funnel, grad_funnel.to(ctx.dtype)


# ---------------------------------------------------------------- Triton

if triton is not None:
    BLOCK = 2048

    @triton.jit
    def _backward_kernel(grad, x, y, grad_x, grad_funnel, count, BLOCK: constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(grad + at, inside, 0.0)
        won = tl.load(y + at, inside, 0.0).to(tl.float32) > tl.load(x + at, inside, 0.0).to(tl.float32)
        tl.store(grad_x + at, tl.where(won, 0.0, g), inside)
        tl.store(grad_funnel + at, tl.where(won, g, 0.0), inside)

    def _run_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Launch the backward kernel, and return its gradients."""
        grad_x, grad_funnel = empty_like(x), empty_like(x)
        with device_of(x):
            _backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                grad, x, y, grad_x, grad_funnel, x.numel(), BLOCK, num_warps=4
            )
        return grad_x, grad_funnel

    _backward_op = register_operator(
        "maximum_backward",
        "(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)",
        _run_backward,
        lambda grad, x, y: (torch.empty_like(x), torch.empty_like(x)),
    )

    def _triton_backward(grad: Tensor, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Call the registered backward operator on dense inputs, and return the gradients."""
        source = make_dense(x)
        grad_x, grad_funnel = _backward_op(match_layout(grad, source), source, match_layout(y, source))
        return grad_x, grad_funnel.to(dtype)


ENTRIES = (
    Entry(
        "frelu",
        FReLU,
        "max(x, BN(DWConv3×3(x)))",
        "Ma et al., ECCV 2020, arXiv:2007.11824",
        aliases=("funnel_relu",),
        tokens=False,
        maps_only_because="it compares neighbouring positions",
        not_pooled_because="around a single position, its convolution sees nothing but padding",
        held_at=FReLU.held_at,
        use_when="To compare each pixel with its neighbourhood, at the cost of a depthwise 3x3 convolution per site.",
        start="the maximum of x and a random convolution of it",
    ),
)
