"""Scaled ReLU, `s * max(x, 0)` with a learned factor: an example of an activation in a package of its own.

`pip install docs/example_activation`, and `rtdetr-act train --act scaled_relu` trains with it: nothing else is touched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.fitting import fit_slopes
from rtdetr_act.activations.protocol import GRID, Entry, Folded
from rtdetr_act.kernels.backend import (
    can_use_triton,
    compute_dtype,
    constexpr,
    device_of,
    needs_autograd,
    needs_plain_ops,
    register_operator,
    tl,
    triton,
)
from rtdetr_act.kernels.blocks import empty_like, make_dense, match_layout
from rtdetr_act.spec import ActSpec


class ScaledReLU(nn.Module):
    """Multiply the positive part of x by a learned factor: one scalar per site.

    `f(x) = exp(log_scale) * max(x, 0)`, so that the factor stays positive.

    Shapes: any to the same. `log_scale` is (1,), shared over channels and positions.

    Args:
        scale: Start of the factor, 1.0 by default.

    Raises:
        ValueError: `scale` is not positive, from math.

    >>> ScaledReLU(2.0)(torch.tensor([-1.0, 1.0])).detach()
    tensor([0., 2.])
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the type of x."""
        return scaled_relu(x, self.log_scale.exp())


# ---------------------------------------------------------------- answers


@torch.no_grad()
def _fit(module: ScaledReLU, target: Tensor) -> Tensor:
    scale = max(fit_slopes(target)[0], 0.01)
    module.log_scale.fill_(math.log(scale))
    return scale * torch.relu(GRID)


def _fold(module: ScaledReLU) -> Folded:
    return Folded(ActSpec("relu"), module.log_scale.detach().double().exp().item())


def _learned(module: ScaledReLU) -> dict[str, Tensor]:
    return {"scale": module.log_scale.exp()}


# ---------------------------------------------------------------- op


def scaled_relu(x: Tensor, scale: Tensor) -> Tensor:
    """Return `scale * max(x, 0)`, in the type and layout of x.

    The backward reads the result alone, which the next layer keeps anyway.

    Args:
        x: Any shape.
        scale: (1,), positive.
    """
    if needs_plain_ops(x):
        return (torch.relu(x) * scale).to(x.dtype)
    return _ScaledReLU.apply(x, scale) if needs_autograd(x, scale) else _forward(x, scale)


class _ScaledReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        y = _forward(x, scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, scale = ctx.saved_tensors
        computed = compute_dtype(y.dtype)
        for_scale = ((grad.to(computed) * y.to(computed)).sum() / scale).to(scale.dtype)
        if can_use_triton(y) and not torch.is_grad_enabled():
            source = make_dense(y)
            return _scale_op(match_layout(grad, source), source, scale), for_scale
        return torch.where(y > 0, grad * scale, 0).to(y.dtype), for_scale


def _forward(x: Tensor, scale: Tensor) -> Tensor:
    source = make_dense(x)
    if can_use_triton(source):
        return _scale_op(source, source, scale)
    return torch.relu(source).to(compute_dtype(x.dtype)).mul_(scale).to(x.dtype)


# ---------------------------------------------------------------- Triton

if triton is not None:
    BLOCK = 2048

    @triton.jit
    def _scale_kernel(x, sign, y, scale, count, BLOCK: constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        value = tl.load(x + at, inside, 0.0).to(tl.float32) * tl.load(scale).to(tl.float32)
        tl.store(y + at, tl.where(tl.load(sign + at, inside, 0.0) > 0, value, 0.0), inside)

    def _run(x: Tensor, sign: Tensor, scale: Tensor) -> Tensor:
        y = empty_like(x)
        with device_of(x):
            _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, sign, y, scale, x.numel(), BLOCK, num_warps=4)
        return y

    _scale_op = register_operator(
        "scaled_relu",
        "(Tensor x, Tensor sign, Tensor scale) -> Tensor",
        _run,
        lambda x, sign, scale: torch.empty_like(x),
    )


ENTRY = Entry(
    "scaled_relu",
    ScaledReLU,
    "s·max(x, 0)",
    "an example",
    fit=_fit,
    fold=_fold,
    homogeneous=True,
    learned=_learned,
    folds_to="relu",
)
