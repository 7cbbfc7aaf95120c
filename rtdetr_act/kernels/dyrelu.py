"""Dynamic ReLU: the largest of K affine functions per image and channel, times an attention over positions or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rtdetr_act.kernels.backend import (
    constexpr,
    define,
    on,
    plain_gradients,
    records,
    tl,
    triton,
    wants_plain,
    wants_triton,
    wide,
    widened,
)
from rtdetr_act.kernels.blocks import (
    Block,
    block_size,
    blocks,
    dense,
    empty_like,
    in_blocks,
    is_small,
    like,
    row_sums,
    scratch,
)
from rtdetr_act.kernels.logits import weighted_sum
from rtdetr_act.kernels.tiles import place, tile


def dyrelu(
    x: Tensor, slopes: Sequence[Tensor], intercepts: Sequence[Tensor], attention: Tensor | None = None
) -> Tensor:
    """Return `attention * max_k(slopes[k] * x + intercepts[k])`, in the type and layout of x.

    Where several terms are the largest, the last of them takes the gradient (compiled, they share it): with slopes
    (1, 0) and intercepts (0, 0) this is ReLU, its gradient at 0 included.

    Args:
        x: (B, C, H, W).
        slopes: K tensors (B, C, 1, 1), or (B, 1, 1, 1) for one of all channels.
        intercepts: As many of the same shape.
        attention: (B, 1, H, W), larger than 0 (where it is 0 it gets no gradient); None for 1 everywhere.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> dyrelu(torch.tensor([[[[-1.0, 2.0]]]]), [one, zero], [zero, zero])
    tensor([[[[0., 2.]]]])
    """
    coefficients = (*slopes, *intercepts)
    if wants_plain(x) or not (x.is_cpu or wants_triton(x)):
        return plain(x, attention, *coefficients)
    if records(x, attention, *coefficients):
        if is_small(x) and not wants_triton(x):
            return plain(x, attention, *coefficients)
        return _DyReLU.apply(x, attention, *coefficients)
    return _forward(x, attention, coefficients)


def plain(x: Tensor, attention: Tensor | None, *coefficients: Tensor) -> Tensor:
    """Compute `dyrelu` in torch's own differentiable operators."""
    k = len(coefficients) // 2
    terms = [x * slope + intercept for slope, intercept in zip(coefficients[:k], coefficients[k:], strict=True)]
    # torch.maximum gives each of two equal terms half of the gradient. A compiler, though, makes a map of masks of the
    # other form, at 20 times a SiLU on a CPU where this takes 2, and equal terms are rare.
    y = reduce(torch.maximum if torch.compiler.is_compiling() else _later_of_equals, terms)
    return (y if attention is None else y * attention).to(x.dtype)


def _later_of_equals(best: Tensor, term: Tensor) -> Tensor:
    return torch.where(best > term, best, term)


class _DyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attention: Tensor | None, *coefficients: Tensor) -> Tensor:
        y = _forward(x, attention, coefficients)
        # The kernels of a GPU find the maximum again in registers; on a CPU it comes from the result, which the next
        # layer keeps anyway.
        needs_result = attention is not None and x.is_cpu and not wants_triton(x)
        ctx.save_for_backward(x, y if needs_result else None, attention, *coefficients)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, attention, *coefficients = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(plain_gradients(plain, (x, attention, *coefficients), grad, ctx.needs_input_grad))
        if wants_triton(x):
            return _triton_backward(grad, x, attention, coefficients)
        return _cpu_backward(grad, x, y, attention, coefficients)


def _forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
    return (_triton_forward if wants_triton(x) else _cpu_forward)(x, attention, coefficients)


# ---------------------------------------------------------------- CPU


def _cpu_forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
    source, computed = dense(x), wide(x.dtype)
    coefficients = widened(coefficients, computed)
    if x.numel() <= block_size() and computed == x.dtype:
        return _forward_block(source, attention, coefficients, None)

    def run(part: Block, out: Tensor | None) -> Tensor:
        return _forward_block(source[part].to(computed), *_cut(part, attention, coefficients), out)

    return in_blocks(source, computed, run)


def _forward_block(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor], out: Tensor | None) -> Tensor:
    # A product and a sum in place are twice as fast as addcmul with its broadcast factors: 50 against 107 µs on
    # 8x16x56x56.
    k = len(coefficients) // 2
    best = torch.mul(x, coefficients[0], out=out).add_(coefficients[k])
    for j in range(1, k):
        term = torch.mul(x, coefficients[j], out=scratch(x)).add_(coefficients[k + j])
        torch.maximum(best, term, out=best)
    return best if attention is None else best.mul_(attention)


def _cpu_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, attention: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    source, computed = dense(x), wide(x.dtype)
    grad = like(grad, source)
    wide_coefficients = widened(coefficients, computed)
    parts = blocks(source)
    if len(parts) == 1:
        grad_x, sums = _backward_block(grad, source, attention, wide_coefficients, None)
    else:
        sums = source.new_zeros((len(coefficients), *source.shape[:2]), dtype=computed)

        def run(part: Block, out: Tensor | None) -> Tensor:
            cut = _cut(part, attention, wide_coefficients)
            found, more = _backward_block(grad[part], source[part], *cut, out)
            sums[:, part[0], part[1]] += more
            return found

        grad_x = in_blocks(source, computed, run)
    of_attention = None
    if attention is not None and y is not None:
        # sum_c(grad * maximum), and the maximum is y / attention. What has no attention at all passes nothing to it.
        by_result = torch.zeros_like(attention, dtype=computed)
        for part in parts:
            part_grad, part_y = grad[part].to(computed), y[part].to(computed)
            products = torch.mul(part_grad, part_y, out=scratch(part_y))
            by_result[part[0], :, part[2]] += weighted_sum(products, products.new_ones(products.shape[1]))
        of_attention = _as(torch.where(attention > 0, by_result / attention, 0), attention)
    grads = [_as(total[..., None, None], c) for total, c in zip(sums, coefficients, strict=True)]
    return grad_x.to(x.dtype), of_attention, *grads


def _backward_block(
    grad: Tensor, x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor], out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a block of x, and of the coefficients as (2K, B, C)."""
    slopes, intercepts = coefficients[: len(coefficients) // 2], coefficients[len(coefficients) // 2 :]
    grad, x = grad.to(slopes[0].dtype), x.to(slopes[0].dtype)
    if attention is not None:
        grad = torch.mul(grad, attention, out=scratch(x, 1))
    last = len(slopes) - 1
    grad_x = torch.mul(grad, slopes[last], out=out)
    products, totals = row_sums(grad, x)
    found = [(products, totals)]
    for j, ahead in enumerate(_leads(x, slopes, intercepts)):
        share = _threshold_backward_out(grad, ahead, 0, grad_input=ahead)  # over what it reads: memory in the cache
        if j < last - 1:
            grad = grad - share
        found.insert(j, row_sums(share, x))
        grad_x.add_(share.mul_(slopes[j] - slopes[last]))
        products, totals = products - found[j][0], totals - found[j][1]
    found[last] = products, totals
    return grad_x, torch.stack([*(of for of, _ in found), *(of for _, of in found)])


def _leads(x: Tensor, slopes: Sequence[Tensor], intercepts: Sequence[Tensor]) -> list[Tensor]:
    """Return by how much each term but the last is ahead of the largest one behind it; with two terms, one map."""
    last = len(slopes) - 1
    if last < 1:
        return []
    found = [torch.mul(x, slopes[-2] - slopes[-1], out=scratch(x)).add_(intercepts[-2] - intercepts[-1])]
    if last > 1:
        top = (x * slopes[-1]).add_(intercepts[-1])
        for j in range(last - 2, -1, -1):
            torch.maximum(top, (x * slopes[j + 1]).add_(intercepts[j + 1]), out=top)
            found.insert(0, (x * slopes[j]).add_(intercepts[j]).sub_(top))
    return found


_threshold_backward_out = torch.ops.aten.threshold_backward.grad_input


def _cut(part: Block, attention: Tensor | None, coefficients: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    images, channels, rows = part
    pi = None if attention is None else attention[images, :, rows]
    return pi, [c[images, channels] if c.shape[1] > 1 else c[images] for c in coefficients]


def _as(grad: Tensor, of: Tensor) -> Tensor:
    """Return a gradient summed to the shape of what was broadcast, in its type."""
    return grad.sum_to_size(of.shape).to(of.dtype)


# ---------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, y, coefficients, attention, images, channels, positions, channel_stride, position_stride,
        K: constexpr, ATTENDS: constexpr, BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr,
    ):  # fmt: skip
        image, _part, c, s, at, inside = place(
            channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_S, WIDE
        )
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        row = coefficients + image * channels + c[:, None]
        known = (c < channels)[:, None]
        step = images * channels
        best = value * tl.load(row, known, 0.0) + tl.load(row + K * step, known, 0.0)
        for j in tl.static_range(1, K):
            term = value * tl.load(row + j * step, known, 0.0) + tl.load(row + (K + j) * step, known, 0.0)
            best = tl.where(term >= best, term, best)
        if ATTENDS:
            best *= tl.load(attention + image * positions + s, s < positions, 0.0).to(tl.float32)[None, :]
        tl.store(y + at, best, inside)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        grad, x, grad_x, coefficients, attention, sums, attended,
        images, channels, positions, channel_stride, position_stride,
        K: constexpr, ATTENDS: constexpr, BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr,
    ):  # fmt: skip
        """Write the gradient of x, and for each tile its part of the sums: no atomics, so every run adds alike."""
        image, part, c, s, at, inside = place(
            channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_S, WIDE
        )
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        row = coefficients + image * channels + c[:, None]
        known = (c < channels)[:, None]
        step = images * channels
        slope = tl.load(row, known, 0.0)
        best = value * slope + tl.load(row + K * step, known, 0.0)
        factor = tl.broadcast_to(slope, (BLOCK_C, BLOCK_S))
        winner = tl.zeros((BLOCK_C, BLOCK_S), tl.int32)
        for j in tl.static_range(1, K):
            slope = tl.load(row + j * step, known, 0.0)
            term = value * slope + tl.load(row + (K + j) * step, known, 0.0)
            ahead = term >= best
            best, factor, winner = (
                tl.where(ahead, term, best),
                tl.where(ahead, slope, factor),
                tl.where(ahead, j, winner),
            )
        if ATTENDS:
            over_channels = attended + (tl.program_id(1).to(tl.int64) * images + image) * positions + s
            tl.store(over_channels, tl.sum(g * best, 0), s < positions)
            g *= tl.load(attention + image * positions + s, s < positions, 0.0).to(tl.float32)[None, :]
        tl.store(grad_x + at, g * factor, inside)
        product = g * value
        of_tile = sums + part.to(tl.int64) * 2 * K * step + image * channels + c
        for j in tl.static_range(0, K):
            tl.store(of_tile + j * step, tl.sum(tl.where(winner == j, product, 0.0), 1), c < channels)
            tl.store(of_tile + (K + j) * step, tl.sum(tl.where(winner == j, g, 0.0), 1), c < channels)

    def _run_forward(x: Tensor, coefficients: Tensor, attention: Tensor | None) -> Tensor:
        y, tiling = empty_like(x), tile(x)
        with on(x):
            _forward_kernel[tiling.grid](
                x, y, coefficients, attention if attention is not None else x, *tiling.arguments,
                K=len(coefficients) // 2, ATTENDS=attention is not None, **tiling.constants,
            )  # fmt: skip
        return y

    def _run_backward(
        grad: Tensor, x: Tensor, coefficients: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, tiling = empty_like(x), tile(x)
        sums = coefficients.new_empty((tiling.along_positions, *coefficients.shape))
        attends = attention is not None
        attended = coefficients.new_empty((tiling.along_channels, x.shape[0], tiling.positions) if attends else (0,))
        with on(x):
            _backward_kernel[tiling.grid](
                grad, x, grad_x, coefficients, attention if attends else x, sums, attended, *tiling.arguments,
                K=len(coefficients) // 2, ATTENDS=attends, **tiling.constants,
            )  # fmt: skip
        return grad_x, sums.sum(0), attended.sum(0)

    def _fake_backward(
        grad: Tensor, x: Tensor, coefficients: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended = coefficients.new_empty(() if attention is None else (x.shape[0], x.shape[2] * x.shape[3]))
        return torch.empty_like(x), torch.empty_like(coefficients), attended

    _forward_op = define(
        "dyrelu",
        "(Tensor x, Tensor coefficients, Tensor? attention) -> Tensor",
        _run_forward,
        lambda x, coefficients, attention: torch.empty_like(x),
    )
    _backward_op = define(
        "dyrelu_backward",
        "(Tensor grad, Tensor x, Tensor coefficients, Tensor? attention) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        _fake_backward,
    )

    def _pack(x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Return the coefficients as one (2K, B, C) in float32."""
        rows = x.shape[:2]
        return torch.stack([c[..., 0, 0].expand(rows) for c in coefficients]).float()

    def _triton_forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
        return _forward_op(dense(x), _pack(x, coefficients), None if attention is None else attention.contiguous())

    def _triton_backward(
        grad: Tensor, x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        source = dense(x)
        pi = None if attention is None else attention.contiguous()
        grad_x, sums, attended = _backward_op(like(grad, source), source, _pack(x, coefficients), pi)
        grads = [_as(total[..., None, None], c) for total, c in zip(sums, coefficients, strict=True)]
        return grad_x, None if attention is None else _as(attended.view(attention.shape), attention), *grads
