"""Elementwise functions with a backward of their own, computed in blocks that fit the CPU cache, from x alone.

Autograd saves a map for most operators that a formula is made of, and reads main memory for each. Here the backward
saves x and computes everything else again, while a block of x is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.backend import cast_all, compute_dtype, differentiable_grad, needs_autograd, needs_plain_ops
from rtdetr_act.kernels.blocks import (
    block_size,
    empty_like,
    is_small,
    make_dense,
    match_layout,
    split_blocks,
    sum_over_positions,
    view_flat,
)

# Elements per block on other devices: 256 MiB for each buffer in float32. On CUDA torch.dot needs less than 2 ** 31
# elements.
_ON_GPU = 1 << 26

Reduce = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Elementwise:
    """An elementwise function of x and of learned parameters.

    `forward` and `backward` get blocks in the dtype to compute in, must not write to their inputs, and take their
    buffers from `scratch_like`. `out` may have another dtype, into which torch's `out=` casts.

    Attributes:
        plain: (x, *parameters) -> f(x), in torch's differentiable operators.
        forward: (x, *parameters, out=...) writes f(x) to `out`.
        backward: (grad, x, *parameters, out=..., reduce=...) writes grad * f'(x) to `out`, and returns the gradients of
            the parameters. `reduce(a, b)` sums a * b over the block to the shape of a parameter.
        buffers: Into how many parts a block is divided, 4 by default: about the number of buffers in use at a time.
    """

    plain: Callable[..., Tensor]
    forward: Callable[..., object]
    backward: Callable[..., Sequence[Tensor]]
    buffers: int = 4


def apply_elementwise(function: Elementwise, x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the function of x, in the dtype and memory format of x.

    Half types are computed in float32.

    Args:
        function: The function.
        x: Any shape; (B, C, H, W) if a parameter is per channel.
        *parameters: Each (1,), one number for all of x, or (C, 1, 1), one per channel; all of the same shape. Or
            vectors of any lengths, for all of x.

    >>> double = Elementwise(
    ...     plain=lambda x, a: x * a,
    ...     forward=lambda x, a, out: torch.mul(x, a, out=out),
    ...     backward=lambda grad, x, a, out, reduce: [torch.mul(grad, a, out=out), reduce(grad, x)][1:],
    ... )
    >>> apply_elementwise(double, torch.ones(3), torch.tensor([2.0]))
    tensor([2., 2., 2.])
    """
    parameters = tuple(cast_all(parameters, compute_dtype(x.dtype)))
    differentiated = needs_autograd(x, *parameters)
    if needs_plain_ops(x) or (differentiated and is_small(x)):
        return _compute_plain(function, x, *parameters)
    if differentiated:
        return _Elementwise.apply(function, x, *parameters)
    return _forward(function, x, parameters)


def _compute_plain(function: Elementwise, x: Tensor, *parameters: Tensor) -> Tensor:
    """Compute the function in torch's own differentiable operators."""
    return function.plain(x.to(compute_dtype(x.dtype)), *parameters).to(x.dtype)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Elementwise, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        return _forward(function, x, parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        function, saved = ctx.function, ctx.saved_tensors
        if torch.is_grad_enabled():

            def compute(*inputs: Tensor) -> Tensor:
                return _compute_plain(function, *inputs)

            return (None, *differentiable_grad(compute, saved, grad, ctx.needs_input_grad[1:]))
        return (None, *_backward(function, grad, *saved))


def _forward(function: Elementwise, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Compute the function block by block."""
    source, dtype = make_dense(x), compute_dtype(x.dtype)
    y = empty_like(source)
    for (part, out), channels in _iterate_blocks((source, y), parameters, function.buffers):
        function.forward(part.to(dtype), *(p[channels] for p in parameters), out=out)
    return y


def _backward(function: Elementwise, grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the parameters, computed block by block."""
    source, dtype = make_dense(x), compute_dtype(x.dtype)
    grad_x, sums = empty_like(source), [torch.zeros_like(p) for p in parameters]
    reduce = _sum_per_channel if _are_per_channel(parameters) else torch.dot
    maps = match_layout(grad, source), source, grad_x
    for (grad_part, part, out), channels in _iterate_blocks(maps, parameters, function.buffers):
        sliced = [p[channels] for p in parameters]
        found = function.backward(grad_part.to(dtype), part.to(dtype), *sliced, out=out, reduce=reduce)
        for total, gradient in zip(sums, found, strict=True):
            total[channels] += gradient
    return grad_x, *sums


def _iterate_blocks(
    maps: Sequence[Tensor], parameters: Sequence[Tensor], buffers: int
) -> Iterator[tuple[list[Tensor], slice]]:
    """Yield the blocks of dense maps of equal strides, flat unless a parameter is per channel, and their channels."""
    size = block_size() // buffers if maps[0].is_cpu else _ON_GPU
    if _are_per_channel(parameters):
        for block in split_blocks(maps[0], size):
            yield [each[block] for each in maps], block[1]
    else:
        for parts in zip(*(view_flat(each).split(size) for each in maps), strict=True):
            yield list(parts), slice(None)


def _are_per_channel(parameters: Sequence[Tensor]) -> bool:
    return any(p.ndim == 3 for p in parameters)


def _sum_per_channel(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b per channel, (C, 1, 1), for maps (B, C, H, W)."""
    return sum_over_positions(a, b)[0].sum(0)[:, None, None]
