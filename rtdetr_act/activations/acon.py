"""ACON-C and Meta-ACON, which learn per channel whether to activate (Ma et al., CVPR 2021, arXiv:2009.04759)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import channel_dim, check_count, check_map
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, POOLS_A_POOLED_MAP, POOLS_OVER_POSITIONS, Entry, Folded, Layout
from rtdetr_act.activations.torch_native import SILU
from rtdetr_act.errors import quote
from rtdetr_act.kernels.aten import sigmoid_backward_
from rtdetr_act.kernels.backend import (
    can_use_triton,
    cast_all,
    compute_dtype,
    constexpr,
    device_of,
    differentiable_grad,
    needs_autograd,
    needs_plain_ops,
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
from rtdetr_act.kernels.pool import global_avg_pool
from rtdetr_act.kernels.recomputable import recomputable
from rtdetr_act.kernels.tiles import locate_tile, tile

INITS = ("paper", "silu")


class AconC(nn.Module):
    """Take a smooth maximum of two linear functions per channel: `(p1 - p2) x * sigmoid(beta (p1 - p2) x) + p2 x`.

    Shapes: (B, C, ...), or (..., C) with layout "tokens", to the same. `p1`, `p2` and `beta` are (C,).

    Args:
        channels: C.
        init: "paper" (default) draws p1 and p2 from N(0, 1) as the authors' code does, for training from scratch; about
            half of the channels then start with a negative slope. "silu" sets p1 = 1 and p2 = 0, which is SiLU exactly,
            for pretrained networks. In both cases beta is initially 1.
        layout: "map" (default) or "tokens".

    Raises:
        ValueError: `channels` is below 1, or `init` or `layout` is unknown.

    Paper: Ma et al., CVPR 2021, arXiv:2009.04759.

    >>> x = torch.randn(2, 8, 3, 3)
    >>> torch.allclose(AconC(8, init="silu")(x), torch.nn.functional.silu(x), atol=1e-6)
    True
    """

    def __init__(self, channels: int, init: str = "paper", *, layout: Layout = "map") -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        channel_dim(layout)
        self.layout = layout
        self.p1, self.p2 = _init_slopes(channels, init)
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return acon(x, self.p1, self.p2, self.beta, self.layout)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return f"{self.channels}, layout={self.layout!r}"


class MetaAconC(nn.Module):
    """ACON-C with a beta per image and channel: `beta = sigmoid(W2 (W1 mean(x) + b1) + b2)`, mean over positions.

    The BatchNorms of the published network are omitted: they fail at batch size 1, where a pooled channel is a single
    value, and make training unstable (YOLOv5 removed them too).

    Shapes: (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same. `p1` and `p2` are (C,).

    Args:
        channels: C.
        reduction: R; the hidden layer has max(C // R, R) features, as in the authors' code. Default: 16.
        init: "paper" (default) draws p1 and p2 from N(0, 1); "silu" sets p1 = 1 and p2 = 0.

    Raises:
        ValueError: A count is below 1 or `init` is unknown.

    Paper: Ma et al., CVPR 2021, arXiv:2009.04759.

    >>> MetaAconC(8)(torch.randn(1, 8, 1, 1)).shape
    torch.Size([1, 8, 1, 1])
    """

    def __init__(self, channels: int, reduction: int = 16, init: str = "paper") -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.reduction = check_count("reduction", reduction)
        hidden = max(channels // reduction, reduction)
        self.p1, self.p2 = _init_slopes(channels, init)
        self.squeeze = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, (B, C, ...), in the shape and dtype of x."""
        return self.held_at(x)(x)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the activation as an elementwise function, with the beta at x held constant."""
        return partial(acon, p1=self.p1, p2=self.p2, beta=self.compute_beta(x))

    def compute_beta(self, x: Tensor) -> Tensor:
        """Return the beta of each image and channel for x, (B, C, ...): (B, C) in 0..1.

        Raises:
            ShapeError: x is not a feature map with C channels.
        """
        check_map(x, self.channels)
        pooled = global_avg_pool(x, self.squeeze.weight.dtype)
        return torch.sigmoid(self.expand(self.squeeze(pooled)))

    def coefficients(self, x: Tensor) -> dict[str, Tensor]:
        """Return what is computed from x, by name: `beta`, (B, C)."""
        return {"beta": self.compute_beta(x)}

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return f"{self.channels}, reduction={self.reduction}"


def _init_slopes(channels: int, init: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the initial p1 and p2, each (C,)."""
    if init not in INITS:
        raise ValueError(f"init is 'paper' or 'silu', not {quote(init)}")
    if init == "silu":
        return nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
    return nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))


# ---------------------------------------------------------------- callbacks of the entry

_LARGEST_BETA = 10.0  # at which p1 = 1, p2 = 0 is ReLU up to 0.028 everywhere


def _evaluate_on_grid(p1: Tensor, p2: Tensor, beta: Tensor) -> Tensor:
    """Return the ACON-C on `GRID`, (1201,), for scalar parameters."""
    return (p1 - p2) * GRID * torch.sigmoid(beta * (p1 - p2) * GRID) + p2 * GRID


@torch.no_grad()
def _fit(module: AconC, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    values, curve = fit_curve(_evaluate_on_grid, target, (1.0, 0.0, 1.0), (-3, -3, 0.1), (3, 3, _LARGEST_BETA))
    for parameter, value in zip((module.p1, module.p2, module.beta), values, strict=True):
        parameter.fill_(value)
    return curve


def _fold(module: AconC) -> Folded | None:
    """Implement `Entry.fold`: return the equivalent in evaluation mode, None if torch has none."""
    pairs = ((module.p1, 1), (module.p2, 0), (module.beta, 1))
    return Folded(SILU) if all(bool(torch.all(values == number)) for values, number in pairs) else None


# ---------------------------------------------------------------- op


@recomputable
def acon(x: Tensor, p1: Tensor, p2: Tensor, beta: Tensor, layout: Layout = "map") -> Tensor:
    """Return the ACON-C of x, in the dtype and memory format of x; with a beta per image it is Meta-ACON.

    Args:
        x: (B, C, ...), or (..., C) with layout "tokens".
        p1: (C,), one of the two slopes: with a positive beta the larger slope applies towards infinity.
        p2: (C,), the other slope.
        beta: (C,), or (B, C) for maps: sharpness of the transition between the slopes.
        layout: "map" (default) or "tokens".

    Paper: Ma et al., CVPR 2021, arXiv:2009.04759.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> acon(torch.tensor([[1.0]]), one, zero, one)  # SiLU
    tensor([[0.7311]])
    """
    # The remaining operations are on (C,) or (B, C), and left to autograd.
    step = p1 - p2
    sharp = beta * step
    small = is_small(x) and not can_use_triton(x) and needs_autograd(x, p2, step, sharp)
    if needs_plain_ops(x) or small or not (x.is_cpu or can_use_triton(x)):
        return plain(x, *(_expand_over(t, x.ndim, layout) for t in (p2, step, sharp)))
    maps = as_map(x, layout)
    coefficients = [_expand_over(t, 4, "map") for t in (p2, step, sharp)]
    y = _Acon.apply(maps, *coefficients) if needs_autograd(x, *coefficients) else _forward(maps, coefficients)
    return from_map(y, x.shape, layout)


def plain(x: Tensor, low: Tensor, step: Tensor, sharp: Tensor) -> Tensor:
    """Compute `x * (low + step * sigmoid(sharp * x))` in torch's own differentiable operators."""
    return (x * (low + step * torch.sigmoid(sharp * x))).to(x.dtype)


def _expand_over(t: Tensor, ndim: int, layout: Layout) -> Tensor:
    """View (C,) or (B, C) with trailing dimensions of 1, so that it broadcasts over maps with `ndim` dimensions."""
    return t if layout == "tokens" else t.reshape(*t.shape, *(1,) * (ndim - 2))


class _Acon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(x, *coefficients)
        return _forward(x, coefficients)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *coefficients = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(differentiable_grad(plain, (x, *coefficients), grad, ctx.needs_input_grad))
        return (_triton_backward if can_use_triton(x) else _cpu_backward)(grad, x, coefficients)


def _forward(x: Tensor, coefficients: Any) -> Tensor:
    """Compute the forward by the backend for x."""
    return (_triton_forward if can_use_triton(x) else _cpu_forward)(x, coefficients)


# ---------------------------------------------------------------- CPU


def _cpu_forward(x: Tensor, coefficients: Any) -> Tensor:
    """Compute the forward on a CPU, in blocks that fit the cache."""
    computed = compute_dtype(x.dtype)
    coefficients = cast_all([_with_batch_dim(c) for c in coefficients], computed)
    if x.numel() <= block_size() and computed == x.dtype:
        return _forward_block(x, coefficients, None)
    source = make_dense(x)

    def process_block(part: Block, out: Tensor | None) -> Tensor:
        return _forward_block(source[part].to(computed), _slice_coefficients(part, coefficients), out)

    return map_blocks(source, computed, process_block)


def _forward_block(x: Tensor, coefficients: Any, out: Tensor | None) -> Tensor:
    """Compute `acon` for one block of x."""
    low, step, sharp = coefficients
    return torch.mul(x, sharp, out=out).sigmoid_().mul_(step).add_(low).mul_(x)


def _cpu_backward(grad: Tensor, x: Tensor, coefficients: Any) -> tuple[Tensor, ...]:
    """Compute the gradients on a CPU, in blocks that fit the cache."""
    source, computed = make_dense(x), compute_dtype(x.dtype)
    grad = match_layout(grad, source)
    per_image = [_with_batch_dim(c.to(computed)) for c in coefficients]
    parts = split_blocks(source)
    if len(parts) == 1:
        grad_x, sums = _backward_block(grad, source, per_image, None)
    else:
        sums = source.new_zeros((3, *source.shape[:2]), dtype=computed)

        def process_block(part: Block, out: Tensor | None) -> Tensor:
            found, more = _backward_block(grad[part], source[part], _slice_coefficients(part, per_image), out)
            sums[:, part[0], part[1]] += more
            return found

        grad_x = map_blocks(source, computed, process_block)
    return grad_x.to(x.dtype), *_reduce_to_coefficients(sums, coefficients)


def _backward_block(grad: Tensor, x: Tensor, coefficients: Any, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradient of a block of x, and the gradients of the coefficients as (3, B, C)."""
    low, step, sharp = coefficients
    grad, x = grad.to(low.dtype), x.to(low.dtype)
    gate = torch.mul(x, sharp, out=out).sigmoid_()
    product = torch.mul(grad, x, out=scratch_like(x))
    for_step, for_low = sum_over_positions(product, gate)
    through_gate = sigmoid_backward_(product, gate)
    for_sharp, _ = sum_over_positions(through_gate, x)
    sums = torch.stack([for_low, for_step, for_sharp * step[..., 0, 0]])
    grad_x = gate.mul_(step).add_(low).mul_(grad).add_(through_gate.mul_(step * sharp))
    return grad_x, sums


def _reduce_to_coefficients(sums: Tensor, coefficients: Any) -> list[Tensor]:
    """Sum gradients (3, B, C) to the shapes of the coefficients, in their dtypes."""
    pairs = zip(sums, coefficients, strict=True)
    return [total[..., None, None].sum_to_size(of.shape).to(of.dtype) for total, of in pairs]


def _with_batch_dim(t: Tensor) -> Tensor:
    """View a coefficient (C, 1, 1) as (1, C, 1, 1)."""
    return t if t.ndim == 4 else t.unsqueeze(0)


def _slice_coefficients(part: Block, coefficients: Any) -> list[Tensor]:
    """Return the coefficients of a block."""
    return [c[part[0] if c.shape[0] > 1 else slice(None), part[1]] for c in coefficients]


# ---------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, y, coefficients, images, channels, positions, channel_stride, position_stride,
        BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr,
    ):  # fmt: skip
        image, _part, c, _s, at, inside = locate_tile(
            channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_S, WIDE
        )
        known = (c < channels)[:, None]
        row, step = coefficients + image * channels + c[:, None], images * channels
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        gate = tl.sigmoid(value * tl.load(row + 2 * step, known, 0.0))
        tl.store(y + at, value * (tl.load(row, known, 0.0) + tl.load(row + step, known, 0.0) * gate), inside)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        grad, x, grad_x, coefficients, sums, images, channels, positions, channel_stride, position_stride,
        BLOCK_C: constexpr, BLOCK_S: constexpr, WIDE: constexpr,
    ):  # fmt: skip
        image, part, c, _s, at, inside = locate_tile(
            channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_S, WIDE
        )
        known = (c < channels)[:, None]
        row, step = coefficients + image * channels + c[:, None], images * channels
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        low, high, sharp = (
            tl.load(row, known, 0.0),
            tl.load(row + step, known, 0.0),
            tl.load(row + 2 * step, known, 0.0),
        )
        gate = tl.sigmoid(value * sharp)
        product = g * value
        through_gate = product * gate * (1.0 - gate) * high
        tl.store(grad_x + at, g * (low + high * gate) + through_gate * sharp, inside)
        of_tile = sums + part.to(tl.int64) * 3 * step + image * channels + c
        tl.store(of_tile, tl.sum(product, 1), c < channels)
        tl.store(of_tile + step, tl.sum(product * gate, 1), c < channels)
        tl.store(of_tile + 2 * step, tl.sum(through_gate * value, 1), c < channels)

    def _run_forward(x: Tensor, coefficients: Tensor) -> Tensor:
        """Launch the forward kernel, and return its output."""
        y, tiling = empty_like(x), tile(x)
        with device_of(x):
            _forward_kernel[tiling.grid](x, y, coefficients, *tiling.arguments, **tiling.constants)
        return y

    def _run_backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Launch the backward kernel, and return its gradients."""
        grad_x, tiling = empty_like(x), tile(x)
        sums = coefficients.new_empty((tiling.along_positions, *coefficients.shape))
        with device_of(x):
            _backward_kernel[tiling.grid](grad, x, grad_x, coefficients, sums, *tiling.arguments, **tiling.constants)
        return grad_x, sums.sum(0)

    _forward_op = register_operator(
        "acon", "(Tensor x, Tensor coefficients) -> Tensor", _run_forward, lambda x, coefficients: torch.empty_like(x)
    )
    _backward_op = register_operator(
        "acon_backward",
        "(Tensor grad, Tensor x, Tensor coefficients) -> (Tensor, Tensor)",
        _run_backward,
        lambda grad, x, coefficients: (torch.empty_like(x), torch.empty_like(coefficients)),
    )

    def _stack_coefficients(x: Tensor, coefficients: Any) -> Tensor:
        """Stack the coefficients into one tensor (3, B, C) in float32."""
        return torch.stack([c[..., 0, 0].expand(x.shape[:2]) for c in coefficients]).float()

    def _triton_forward(x: Tensor, coefficients: Any) -> Tensor:
        """Call the registered forward operator on a dense input."""
        return _forward_op(make_dense(x), _stack_coefficients(x, coefficients))

    def _triton_backward(grad: Tensor, x: Tensor, coefficients: Any) -> tuple[Tensor, ...]:
        """Call the registered backward operator on dense inputs, and return the gradients."""
        source = make_dense(x)
        grad_x, sums = _backward_op(match_layout(grad, source), source, _stack_coefficients(x, coefficients))
        return grad_x, *_reduce_to_coefficients(sums, coefficients)


_PAPER = "Ma et al., CVPR 2021, arXiv:2009.04759"
ENTRIES = (
    Entry(
        "aconc",
        AconC,
        "(p1 − p2)·x·σ(β·(p1 − p2)·x) + p2·x per channel",
        _PAPER,
        aliases=("acon_c", "acon"),
        fit=_fit,
        fold=_fold,
        use_when=(
            "To learn for each channel how linear it is. It can be silu exactly, which is where init=match starts in "
            "a network trained with silu."
        ),
        title="ACON-C",
        start="slopes p1 and p2 from N(0, 1) for each channel, β = 1",
    ),
    Entry(
        "meta_aconc",
        MetaAconC,
        "(p1 − p2)·x·σ(β(x)·(p1 − p2)·x) + p2·x, β(x) = σ(W₂·(W₁·mean(x)))",
        _PAPER,
        aliases=("meta_acon_c", "meta_acon"),
        tokens=False,
        maps_only_because=POOLS_OVER_POSITIONS,
        not_pooled_because=POOLS_A_POOLED_MAP,
        coefficients=MetaAconC.coefficients,
        held_at=MetaAconC.held_at,
        use_when="As aconc, where the switch between linear and not should depend on the image.",
        title="Meta-ACON",
        start="slopes p1 and p2 from N(0, 1) for each channel, β(x) of random layers",
    ),
)
