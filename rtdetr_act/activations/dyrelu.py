"""Dynamic ReLU in its variants A, B and C (Chen et al., ECCV 2020, arXiv:2003.10027)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import check_count, check_map, check_positive
from rtdetr_act.activations.exporting import copy_scaled, linear_to_conv
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, POOLS_A_POOLED_MAP, POOLS_OVER_POSITIONS, Entry
from rtdetr_act.activations.temperature import TAU_EPOCHS, Temperature
from rtdetr_act.kernels.aten import zero_unless_positive
from rtdetr_act.kernels.backend import (
    can_use_triton,
    cast_all,
    compute_dtype,
    constexpr,
    device_of,
    differentiable_grad,
    needs_autograd,
    needs_plain_ops,
    read_parameters,
    register_operator,
    tl,
    triton,
)
from rtdetr_act.kernels.blocks import (
    Block,
    as_map,
    block_size,
    empty_like,
    from_map,
    is_small,
    make_dense,
    map_blocks,
    match_layout,
    scratch_like,
    split_blocks,
    sum_over_positions,
)
from rtdetr_act.kernels.logits import compute_logits, flatten_positions, weighted_sum
from rtdetr_act.kernels.maxima import compiled_maximum
from rtdetr_act.kernels.pool import global_avg_pool
from rtdetr_act.kernels.recomputable import recomputable
from rtdetr_act.kernels.tiles import locate_tile, tile


class _DyReLU(nn.Module):
    """Base class of the variants: `y = max_k(a^k(x) * x + b^k(x))` with coefficients computed from the pooled input.

    The last Linear is initialised to zero, so that the module is initially ReLU exactly: the paper's alpha = (1, 0, …)
    and beta = 0. Its gradient reaches the first Linear from the second step on. With K > 2 the terms from the second on
    would stay equal, so the weight is then drawn from N(0, 0.001²).

    The formula has no notion of height and width, so maps of 1 or 3 spatial dimensions are viewed as (B, C, P, 1) with
    P positions, and the parameters do not depend on the number of dimensions.
    """

    per_channel = True
    layers: tuple[str, ...] = ("squeeze", "expand")

    def __init__(
        self, channels: int, reduction: int = 8, k: int = 2, lambda_a: float = 1.0, lambda_b: float = 0.5
    ) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.reduction = check_count("reduction", reduction)
        self.k = check_count("k", k)
        self.lambda_a = check_positive("lambda_a", lambda_a, or_zero=True)
        self.lambda_b = check_positive("lambda_b", lambda_b, or_zero=True)
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, 2 * k * (channels if self.per_channel else 1))
        nn.init.zeros_(self.expand.bias)
        if k > 2:
            nn.init.normal_(self.expand.weight, std=1e-3)
        else:
            nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, (B, C, ...), in the shape and dtype of x."""
        parameters = read_parameters(x, self, self.layers)
        if parameters is not None and x.ndim == 4 and x.shape[1] == self.channels and x.numel():
            return self._infer(x, parameters)
        return self.held_at(x)(x)

    def _infer(self, x: Tensor, parameters: Sequence[Tensor], attention: Tensor | None = None) -> Tensor:
        """Compute the activation from the parameters of its layers.

        On 64x7x7 its 15 calls of torch take 24 µs, of which 13 are left on tensors of one element; through the layers
        it takes 39 µs. Nothing is prepared that could be out of date: the factors that would be worth folding into
        the weights are arguments of `addmm`.
        """
        weight, bias, last_weight, last_bias = parameters[:4]
        positions = x.shape[2] * x.shape[3]
        hidden = torch.addmm(bias, x.sum((2, 3)), weight.t(), alpha=1 / positions).relu_()
        deltas = torch.addmm(last_bias, hidden, last_weight.t(), beta=0.5, alpha=0.5).tanh_()
        width = deltas.shape[1] // (2 * self.k)
        offsets, ranges = _coefficient_ranges(self.k, width, self.lambda_a, self.lambda_b, x.dtype)
        coefficients = torch.addcmul(offsets, deltas, ranges).view(-1, 2 * self.k, width, 1, 1).unbind(1)
        return _cpu_forward(x, attention, coefficients)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the activation as an elementwise function, with the coefficients at x held constant."""
        slopes, intercepts = self.coefficients(x)
        return partial(dyrelu, slopes=slopes, intercepts=intercepts)

    def coefficients(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the K slopes and K intercepts for x, which broadcast over x.

        For x (B, C, H, W) each is (B, C, 1, 1), in variant A (B, 1, 1, 1); they have as many dimensions as x.

        Raises:
            ShapeError: x is not a feature map with C channels.
        """
        check_map(x, self.channels)
        pooled = global_avg_pool(x, self.squeeze.weight.dtype)
        # The paper's 2 * sigmoid(z) - 1 is tanh(z / 2), which is accurate near 0: in bfloat16 the former is a multiple
        # of 0.004.
        deltas = torch.tanh(0.5 * self.expand(F.relu(self.squeeze(pooled))))
        for_each_position = (slice(None), slice(None), *(None,) * (x.ndim - 2))
        parts = deltas[for_each_position].chunk(2 * self.k, 1)
        slopes = [_scale(part, self.lambda_a) for part in parts[: self.k]]
        return [slopes[0] + 1, *slopes[1:]], [_scale(part, self.lambda_b) for part in parts[self.k :]]

    def coefficients_by_name(self, x: Tensor) -> dict[str, Tensor]:
        """Return the coefficients for x by name: `a1` … `aK` and `b1` … `bK`, in the shapes of `coefficients`.

        >>> list(DyReLUB(8).coefficients_by_name(torch.randn(2, 8, 3, 3)))
        ['a1', 'a2', 'b1', 'b2']
        """
        both = zip("ab", self.coefficients(x), strict=True)
        return {f"{letter}{index}": part for letter, parts in both for index, part in enumerate(parts, 1)}

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return (
            f"{self.channels}, reduction={self.reduction}, k={self.k}, "
            f"lambda_a={self.lambda_a:g}, lambda_b={self.lambda_b:g}"
        )


class DyReLUA(_DyReLU):
    """Dynamic ReLU, variant A: one set of 2K coefficients per image, shared by its channels and positions.

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same. Initially it is ReLU exactly.

    Args:
        channels: C.
        reduction: R; the hidden layer has max(C // R, 1) features. Default: 8 (published code also uses 4).
        k: Number K of affine terms. Default: 2.
        lambda_a: Range of the slopes around (1, 0, …). Default: 1.0.
        lambda_b: Range of the intercepts around 0. Default: 0.5.

    Raises:
        ValueError: A count is below 1 or a lambda is negative.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> x = torch.randn(2, 16, 4, 4)
    >>> torch.equal(DyReLUA(16)(x), torch.relu(x))
    True
    """

    per_channel = False


class DyReLUB(_DyReLU):
    """Dynamic ReLU, variant B: 2K coefficients per image and channel, shared by the positions.

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same. Initially it is ReLU exactly.

    Args:
        channels: C.
        reduction: R; the hidden layer has max(C // R, 1) features. Default: 8.
        k: Number K of affine terms. Default: 2.
        lambda_a: Range of the slopes around (1, 0, …). Default: 1.0.
        lambda_b: Range of the intercepts around 0. Default: 0.5.

    Raises:
        ValueError: A count is below 1 or a lambda is negative.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> DyReLUB(16, reduction=4)
    DyReLUB(
      16, reduction=4, k=2, lambda_a=1, lambda_b=0.5
      (squeeze): Linear(in_features=16, out_features=4, bias=True)
      (expand): Linear(in_features=4, out_features=64, bias=True)
    )
    """


class DyReLUC(_DyReLU):
    """Dynamic ReLU, variant C: the coefficients of variant B times a spatial attention pi.

    `pi = min(gamma * softmax(z / tau), 1)` over all positions of an image, where gamma is a third of their number
    (H * W / 3) and z is a 1x1 convolution to one channel.

    The softmax sums to 1, so the mean of pi is at most 1/3, and initially the module is about ReLU / 3. That is the
    paper's formula; the BatchNorm after the next convolution compensates for the factor.

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same.

    Args:
        channels: C.
        reduction: R; the hidden layer has max(C // R, 1) features. Default: 8.
        k: Number K of affine terms. Default: 2.
        lambda_a: Range of the slopes around (1, 0, …). Default: 1.0.
        lambda_b: Range of the intercepts around 0. Default: 0.5.
        tau: Temperature of the softmax. Default: 10.
        tau_start: Temperature before the first step, annealed linearly to `tau`. Default: None, no annealing.
        tau_epochs: Epochs of annealing. Default: 10, as in dynamic convolution.

    Raises:
        ValueError: A count is below 1, a lambda is negative or a temperature or `tau_epochs` is not positive.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> DyReLUC(16)(torch.randn(2, 16, 4, 4)).shape
    torch.Size([2, 16, 4, 4])
    """

    layers = ("squeeze", "expand", "spatial")

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        k: int = 2,
        lambda_a: float = 1.0,
        lambda_b: float = 0.5,
        tau: float = 10.0,
        *,
        tau_start: float | None = None,
        tau_epochs: float = TAU_EPOCHS,
    ) -> None:
        super().__init__(channels, reduction, k, lambda_a, lambda_b)
        self.temperature = Temperature(tau, tau_start, tau_epochs)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the activation as an elementwise function, with the coefficients and attention at x held constant."""
        # Since pi >= 0, max_k(pi * (a x + b)) = pi * max_k(a x + b): one product instead of 2K.
        slopes, intercepts = self.coefficients(x)
        return partial(dyrelu, slopes=slopes, intercepts=intercepts, attention=self.attention(x))

    def _infer(self, x: Tensor, parameters: Sequence[Tensor], attention: Tensor | None = None) -> Tensor:
        images, channels, height, width = x.shape
        factors = parameters[4].view(1, 1, channels).expand(images, 1, channels)
        z = torch.baddbmm(parameters[5], factors, flatten_positions(make_dense(x))).div_(self.temperature())
        pi = torch.softmax(z, 2).mul_(height * width / 3).clamp_(max=1).view(images, 1, height, width)
        return super()._infer(x, parameters, pi)

    def coefficients_by_name(self, x: Tensor) -> dict[str, Tensor]:
        """Return the coefficients of variant B for x by name, and the attention `pi`, (B, 1, ...)."""
        return {**super().coefficients_by_name(x), "pi": self.attention(x)}

    def attention(self, x: Tensor) -> Tensor:
        """Return the spatial attention pi for x, (B, C, ...): (B, 1, ...) in 0..1, in float32 for half types."""
        # The softmax is over all positions of an image; a widely copied implementation reshapes z to (N, C, -1). Half
        # types need float32, because 1 / (H * W) of a 160x160 map is below the smallest normal number of float16.
        maps = as_map(x, "map")
        z = compute_logits(maps, self.spatial.weight, cast(Tensor, self.spatial.bias))
        share = torch.softmax(z.flatten(1) / self.temperature(), dim=1)
        pi = (share * (maps.shape[2] * maps.shape[3] / 3)).clamp(max=1)
        return pi.view_as(z) if x.ndim == 4 else pi.view(x.shape[0], 1, *x.shape[2:])


@lru_cache(maxsize=128)
def _coefficient_ranges(
    k: int, width: int, lambda_a: float, lambda_b: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what the K slopes and K intercepts are around, and how far they reach, each (2 * K * width,) on a CPU."""
    offsets = torch.tensor([1.0] + [0.0] * (2 * k - 1), dtype=dtype, device="cpu")
    ranges = torch.tensor([lambda_a] * k + [lambda_b] * k, dtype=dtype, device="cpu")
    return offsets.repeat_interleave(width), ranges.repeat_interleave(width)


def _scale(part: Tensor, factor: float) -> Tensor:
    return part if factor == 1 else factor * part


# ---------------------------------------------------------------- callbacks of the entry

# The part of the range of tanh that a fit may use; at the end of the range the gradient vanishes.
_RANGE = 0.95


def _max_of_two_lines(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """Return max(a1 x + b1, a2 x + b2) on `GRID`, (1201,)."""
    return torch.maximum(a1 * GRID + b1, a2 * GRID + b2)


@torch.no_grad()
def _fit(module: _DyReLU, target: Tensor) -> Tensor:
    """Fit input-independent coefficients, set as the bias of the last Linear; for variant C, pi is taken as 1/3."""
    pi = 1 / 3 if isinstance(module, DyReLUC) else 1.0
    wide_slope, wide_shift = _RANGE * module.lambda_a, _RANGE * module.lambda_b
    if module.k < 2 or wide_slope == 0 or wide_shift == 0:
        return torch.relu(GRID) * pi
    low = (1 - wide_slope, -wide_slope, -wide_shift, -wide_shift)
    high = (1 + wide_slope, wide_slope, wide_shift, wide_shift)
    (a1, a2, b1, b2), curve = fit_curve(_max_of_two_lines, target / pi, (1.0, 0.0, 0.0, 0.0), low, high)
    # Further terms repeat the second one, which does not change the maximum.
    first = [(a1 - 1) / module.lambda_a] + [a2 / module.lambda_a] * (module.k - 1)
    second = [b1 / module.lambda_b] + [b2 / module.lambda_b] * (module.k - 1)
    deltas = torch.tensor([*first, *second], dtype=torch.float64)
    bias = (2 * torch.atanh(deltas)).repeat_interleave(module.expand.bias.numel() // len(deltas))
    module.expand.bias.copy_(bias)
    return curve * pi


class ConvDyReLU(nn.Module):
    """An equivalent of dynamic ReLU for NPUs, made of 4-D operators: pooling, 1x1 convolutions, sums and maxima.

    The attention of variant C, `min(HW/3 * softmax(z), 1)` over all positions, is computed as
    `min(e / (3 mean(e)), 1)` with `e = exp(z - max(z))`, which needs neither a reshape nor the size of the map.

    Shapes: (B, C, H, W) to the same; (B, C, L) and (B, C, D, H, W) are reshaped to it and back.

    Args:
        activation: The module to convert.
    """

    def __init__(self, activation: _DyReLU) -> None:
        super().__init__()
        self.k, self.lambda_a, self.lambda_b = activation.k, activation.lambda_a, activation.lambda_b
        self.squeeze = linear_to_conv(activation.squeeze)
        self.expand = linear_to_conv(activation.expand, 0.5)  # the factor 1/2 of tanh(z / 2)
        self.spatial = None
        if isinstance(activation, DyReLUC):
            self.spatial = copy_scaled(activation.spatial, 1 / float(activation.temperature()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, (B, C, ...)."""
        if x.ndim != 4:
            return from_map(self(as_map(x, "map")), x.shape, "map")
        hidden = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        # Not chunk, since an exporter would compute its sizes from the shape at run time.
        parts = torch.tanh(self.expand(hidden)).split(self.expand.out_channels // (2 * self.k), 1)
        terms = []
        for j, (slope, intercept) in enumerate(zip(parts[: self.k], parts[self.k :], strict=True)):
            slope = _scale(slope, self.lambda_a)
            terms.append(x * (slope + 1 if j == 0 else slope) + _scale(intercept, self.lambda_b))
        y = reduce(torch.maximum, terms)
        if self.spatial is None:
            return y
        z = self.spatial(x)
        e = torch.exp(z - z.amax((2, 3), keepdim=True))
        return y * (e / (3 * F.adaptive_avg_pool2d(e, 1))).clamp(max=1)


# ---------------------------------------------------------------- op


@recomputable
def dyrelu(
    x: Tensor, slopes: Sequence[Tensor], intercepts: Sequence[Tensor], attention: Tensor | None = None
) -> Tensor:
    """Return `attention * max_k(slopes[k] * x + intercepts[k])`, in the dtype and memory format of x.

    Ties pass the gradient to the last of the largest terms. With slopes (1, 0) and intercepts (0, 0) this is ReLU,
    including its gradient at 0.

    Args:
        x: (B, C, ...).
        slopes: K tensors (B, C, 1, ...) with as many dimensions as x, or (B, 1, 1, ...) for slopes shared by all
            channels.
        intercepts: K tensors of the same shape.
        attention: (B, 1, ...), positive; where it is 0, it gets no gradient. Default: None, 1 everywhere.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> dyrelu(torch.tensor([[[[-1.0, 2.0]]]]), [one, zero], [zero, zero])
    tensor([[[[0., 2.]]]])
    """
    if x.ndim != 4:
        a, b = ([as_map(each, "map") for each in some] for some in (slopes, intercepts))
        y = dyrelu(as_map(x, "map"), a, b, None if attention is None else as_map(attention, "map"))
        return from_map(y, x.shape, "map")
    coefficients = (*slopes, *intercepts)
    if needs_plain_ops(x) or not (x.is_cpu or can_use_triton(x)):
        return plain(x, attention, *coefficients)
    if needs_autograd(x, attention, *coefficients):
        if is_small(x) and not can_use_triton(x):
            return plain(x, attention, *coefficients)
        return _DyReLUFunction.apply(x, attention, *coefficients)
    return _forward(x, attention, coefficients)


def plain(x: Tensor, attention: Tensor | None, *coefficients: Tensor) -> Tensor:
    """Compute `dyrelu` in torch's own differentiable operators."""
    k = len(coefficients) // 2
    terms = [x * slope + intercept for slope, intercept in zip(coefficients[:k], coefficients[k:], strict=True)]
    y = reduce(compiled_maximum if torch.compiler.is_compiling() else _maximum_with_gradient_to_last, terms)
    return (y if attention is None else y * attention).to(x.dtype)


def _maximum_with_gradient_to_last(best: Tensor, term: Tensor) -> Tensor:
    """Return the maximum; where both are equal, the whole gradient goes to the second."""
    return torch.where(best > term, best, term)


class _DyReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attention: Tensor | None, *coefficients: Tensor) -> Tensor:
        y = _forward(x, attention, coefficients)
        # The GPU kernels recompute the maximum in registers; on a CPU it is derived from the output, which the next
        # layer saves anyway.
        needs_result = attention is not None and x.is_cpu and not can_use_triton(x)
        ctx.save_for_backward(x, y if needs_result else None, attention, *coefficients)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, attention, *coefficients = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable_grad(plain, (x, attention, *coefficients), grad, ctx.needs_input_grad))
        if can_use_triton(x):
            return _triton_backward(grad, x, attention, coefficients)
        return _cpu_backward(grad, x, y, attention, coefficients)


def _forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
    """Compute the forward by the backend for x."""
    return (_triton_forward if can_use_triton(x) else _cpu_forward)(x, attention, coefficients)


# ---------------------------------------------------------------- CPU


def _cpu_forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
    """Compute the forward on a CPU, in blocks that fit the cache."""
    source, computed = make_dense(x), compute_dtype(x.dtype)
    coefficients = cast_all(coefficients, computed)
    if x.numel() <= block_size() and computed == x.dtype:
        return _forward_block(source, attention, coefficients, None)

    def process_block(part: Block, out: Tensor | None) -> Tensor:
        return _forward_block(source[part].to(computed), *_slice_coefficients(part, attention, coefficients), out)

    return map_blocks(source, computed, process_block)


def _forward_block(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor], out: Tensor | None) -> Tensor:
    """Compute `dyrelu` for one block of x."""
    # A product and an in-place sum are twice as fast as addcmul with broadcast factors: 50 and 107 µs on 8x16x56x56.
    k = len(coefficients) // 2
    best = torch.mul(x, coefficients[0], out=out).add_(coefficients[k])
    for j in range(1, k):
        kept = None if is_small(x) else scratch_like(x)
        term = torch.mul(x, coefficients[j], out=kept).add_(coefficients[k + j])
        torch.maximum(best, term, out=best)
    return best if attention is None else best.mul_(attention)


def _cpu_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, attention: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients on a CPU, in blocks that fit the cache."""
    source, computed = make_dense(x), compute_dtype(x.dtype)
    grad = match_layout(grad, source)
    wide_coefficients = cast_all(coefficients, computed)
    parts = split_blocks(source)
    if len(parts) == 1:
        grad_x, sums = _backward_block(grad, source, attention, wide_coefficients, None)
    else:
        sums = source.new_zeros((len(coefficients), *source.shape[:2]), dtype=computed)

        def process_block(part: Block, out: Tensor | None) -> Tensor:
            cut = _slice_coefficients(part, attention, wide_coefficients)
            found, more = _backward_block(grad[part], source[part], *cut, out)
            sums[:, part[0], part[1]] += more
            return found

        grad_x = map_blocks(source, computed, process_block)
    of_attention = None
    if attention is not None and y is not None:
        # The gradient is sum_c(grad * maximum), where the maximum is y / attention. Where attention is 0, it is 0.
        by_result = torch.zeros_like(attention, dtype=computed)
        for part in parts:
            part_grad, part_y = grad[part].to(computed), y[part].to(computed)
            products = torch.mul(part_grad, part_y, out=scratch_like(part_y))
            by_result[part[0], :, part[2]] += weighted_sum(products, products.new_ones(products.shape[1]))
        of_attention = _reduce_like(torch.where(attention > 0, by_result / attention, 0), attention)
    grads = [_reduce_like(total[..., None, None], c) for total, c in zip(sums, coefficients, strict=True)]
    return grad_x.to(x.dtype), of_attention, *grads


def _backward_block(
    grad: Tensor, x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor], out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a block of x, and the gradients of the coefficients as (2K, B, C)."""
    slopes, intercepts = coefficients[: len(coefficients) // 2], coefficients[len(coefficients) // 2 :]
    grad, x = grad.to(slopes[0].dtype), x.to(slopes[0].dtype)
    if attention is not None:
        grad = torch.mul(grad, attention, out=scratch_like(x, 1))
    last = len(slopes) - 1
    grad_x = torch.mul(grad, slopes[last], out=out)
    products, totals = sum_over_positions(grad, x)
    found = [(products, totals)]
    for j, ahead in enumerate(_compute_margins(x, slopes, intercepts)):
        share = zero_unless_positive(grad, ahead, ahead)  # in place, in memory that is in the cache
        if j < last - 1:
            grad = grad - share
        found.insert(j, sum_over_positions(share, x))
        grad_x.add_(share.mul_(slopes[j] - slopes[last]))
        products, totals = products - found[j][0], totals - found[j][1]
    found[last] = products, totals
    return grad_x, torch.stack([*(of for of, _ in found), *(of for _, of in found)])


def _compute_margins(x: Tensor, slopes: Sequence[Tensor], intercepts: Sequence[Tensor]) -> list[Tensor]:
    """Return by how much each term except the last exceeds the largest of the later terms: K - 1 maps."""
    last = len(slopes) - 1
    if last < 1:
        return []
    found = [torch.mul(x, slopes[-2] - slopes[-1], out=scratch_like(x)).add_(intercepts[-2] - intercepts[-1])]
    if last > 1:
        top = (x * slopes[-1]).add_(intercepts[-1])
        for j in range(last - 2, -1, -1):
            torch.maximum(top, (x * slopes[j + 1]).add_(intercepts[j + 1]), out=top)
            found.insert(0, (x * slopes[j]).add_(intercepts[j]).sub_(top))
    return found


def _slice_coefficients(
    part: Block, attention: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor]]:
    images, channels, rows = part
    pi = None if attention is None else attention[images, :, rows]
    return pi, [c[images, channels] if c.shape[1] > 1 else c[images] for c in coefficients]


def _reduce_like(grad: Tensor, of: Tensor) -> Tensor:
    """Sum a gradient over broadcast dimensions, to the shape and dtype of a tensor."""
    return grad.sum_to_size(of.shape).to(of.dtype)


# ---------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, y, coefficients, attention, images, channels, positions, channel_stride, position_stride,
        K: constexpr, ATTENDS: constexpr, BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr,
    ):  # fmt: skip
        image, _part, c, s, at, inside = locate_tile(
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
        """Write the gradient of x and the partial sums of each tile, without atomics, so results are deterministic."""
        image, part, c, s, at, inside = locate_tile(
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
        """Launch the forward kernel, and return its output."""
        y, tiling = empty_like(x), tile(x)
        with device_of(x):
            _forward_kernel[tiling.grid](
                x, y, coefficients, attention if attention is not None else x, *tiling.arguments,
                K=len(coefficients) // 2, ATTENDS=attention is not None, **tiling.constants,
            )  # fmt: skip
        return y

    def _run_backward(
        grad: Tensor, x: Tensor, coefficients: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the backward kernel, and return its gradients."""
        grad_x, tiling = empty_like(x), tile(x)
        sums = coefficients.new_empty((tiling.along_positions, *coefficients.shape))
        attends = attention is not None
        attended = coefficients.new_empty((tiling.along_channels, x.shape[0], tiling.positions) if attends else (0,))
        with device_of(x):
            _backward_kernel[tiling.grid](
                grad, x, grad_x, coefficients, attention if attends else x, sums, attended, *tiling.arguments,
                K=len(coefficients) // 2, ATTENDS=attends, **tiling.constants,
            )  # fmt: skip
        return grad_x, sums.sum(0), attended.sum(0)

    def _fake_backward(
        grad: Tensor, x: Tensor, coefficients: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return empty gradients of the right shapes, for tracing."""
        attended = coefficients.new_empty(() if attention is None else (x.shape[0], x.shape[2] * x.shape[3]))
        return torch.empty_like(x), torch.empty_like(coefficients), attended

    _forward_op = register_operator(
        "dyrelu",
        "(Tensor x, Tensor coefficients, Tensor? attention) -> Tensor",
        _run_forward,
        lambda x, coefficients, attention: torch.empty_like(x),
    )
    _backward_op = register_operator(
        "dyrelu_backward",
        "(Tensor grad, Tensor x, Tensor coefficients, Tensor? attention) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        _fake_backward,
    )

    def _stack_coefficients(x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Stack the coefficients into one tensor (2K, B, C) in float32."""
        rows = x.shape[:2]
        return torch.stack([c[..., 0, 0].expand(rows) for c in coefficients]).float()

    def _triton_forward(x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
        """Call the registered forward operator on a dense input."""
        return _forward_op(
            make_dense(x), _stack_coefficients(x, coefficients), None if attention is None else attention.contiguous()
        )

    def _triton_backward(
        grad: Tensor, x: Tensor, attention: Tensor | None, coefficients: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Call the registered backward operator on dense inputs, and return the gradients."""
        source = make_dense(x)
        pi = None if attention is None else attention.contiguous()
        grad_x, sums, attended = _backward_op(
            match_layout(grad, source), source, _stack_coefficients(x, coefficients), pi
        )
        grads = [_reduce_like(total[..., None, None], c) for total, c in zip(sums, coefficients, strict=True)]
        return grad_x, None if attention is None else _reduce_like(attended.view(attention.shape), attention), *grads


def _entry(letter: str, factory: type[_DyReLU], formula: str, use_when: str, start: str = "") -> Entry:
    return Entry(
        f"dyrelu_{letter.lower()}",
        factory,
        formula,
        "Chen et al., ECCV 2020, arXiv:2003.10027",
        aliases=(f"dynamic_relu_{letter.lower()}",),
        tokens=False,
        maps_only_because=POOLS_OVER_POSITIONS,
        not_pooled_because=POOLS_A_POOLED_MAP,
        fit=_fit,
        exportable=ConvDyReLU,  # without comparisons, which NCNN lacks
        coefficients=factory.coefficients_by_name,
        held_at=factory.held_at,
        use_when=use_when,
        title=f"DY-ReLU-{letter}",
        start=start,
    )


ENTRIES = (
    _entry(
        "A",
        DyReLUA,
        "max_k(aᵏ(x)·x + bᵏ(x)), a and b per image",
        "To let the slopes depend on the image, shared by all channels; the dynamic ReLU with the fewest parameters.",
    ),
    _entry(
        "B",
        DyReLUB,
        "max_k(aᵏ(x)·x + bᵏ(x)), a and b per image and channel",
        "To let the slopes depend on image and channel; its paper recommends it for backbones. It starts as relu.",
    ),
    _entry(
        "C",
        DyReLUC,
        "min(HW/3·softmax(z/τ), 1)·max_k(aᵏ(x)·x + bᵏ(x)), z a 1×1 convolution",
        "As dyrelu_b, with an attention over positions; its paper recommends it for heads that locate keypoints.",
        "relu times a random attention of about 1/3",
    ),
)
