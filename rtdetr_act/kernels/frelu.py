"""The maximum of FReLU: of a map and of what its funnel makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.backend import constexpr, define, on, records, tl, triton, wants_plain, wants_triton
from rtdetr_act.kernels.blocks import dense, empty_like, like


def maximum(x: Tensor, funnel: Tensor) -> Tensor:
    """Return the larger of both, elementwise, in the type and layout of x.

    The backward reads x and the result, both of which their neighbours keep anyway; torch's own keeps the funnel too,
    and builds a map of ties. Where both are equal, x takes the gradient (compiled, they share it).

    Args:
        x: Any shape.
        funnel: The same shape.

    Paper: Ma et al., ECCV 2020, arXiv:2007.11824.

    >>> maximum(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 3.])
    """
    if wants_plain(x) or not records(x, funnel):
        return plain(x, funnel)
    return _Maximum.apply(x, funnel)


def plain(x: Tensor, funnel: Tensor) -> Tensor:
    """Compute `maximum` in torch's own differentiable operators."""
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
            won = (y > x).detach()  # where the funnel did; linear in the gradient alone
            return torch.where(won, 0, grad), torch.where(won, grad, 0).to(ctx.dtype)
        if wants_triton(x):
            return _triton_backward(grad, x, y, ctx.dtype)
        grad, lead = like(grad, y), y - like(x, y)
        for_funnel = _threshold_backward_out(grad, lead, 0, grad_input=lead)
        return grad - for_funnel, for_funnel.to(ctx.dtype)


_threshold_backward_out = torch.ops.aten.threshold_backward.grad_input


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
        grad_x, grad_funnel = empty_like(x), empty_like(x)
        with on(x):
            _backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                grad, x, y, grad_x, grad_funnel, x.numel(), BLOCK, num_warps=4
            )
        return grad_x, grad_funnel

    _backward_op = define(
        "maximum_backward",
        "(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)",
        _run_backward,
        lambda grad, x, y: (torch.empty_like(x), torch.empty_like(x)),
    )

    def _triton_backward(grad: Tensor, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        source = dense(x)
        grad_x, grad_funnel = _backward_op(like(grad, source), source, like(y, source))
        return grad_x, grad_funnel.to(dtype)
