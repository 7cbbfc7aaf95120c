"""AReLU: attention-based rectified linear unit (Chen, Li & Xu, arXiv:2006.13858)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.checks import check_finite
from rtdetr_act.activations.fitting import fit_slopes
from rtdetr_act.activations.protocol import GRID, Entry, Folded
from rtdetr_act.activations.torch_native import leaky_relu_spec
from rtdetr_act.kernels import leaky
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
from rtdetr_act.kernels.recomputable import recomputable


class AReLU(nn.Module):
    """Scale positive inputs by one learned slope and negative inputs by another.

    `f(x) = clamp(alpha, 0.01, 0.99) * x` for x < 0 and `(1 + sigmoid(beta)) * x` for x >= 0. The clamp passes no
    gradient outside its range, as in the paper.

    Shapes: any to the same. `alpha` and `beta` are (1,), shared by all channels and positions.

    Args:
        alpha: Initial negative slope. Default: 0.90.
        beta: Initial logit of the positive slope. Default: 2.0, a slope of 1.8808.
        inplace: Write the output over the input, which saves one map of memory. Valid only after a layer whose backward
            does not read its output, such as BatchNorm, where `patch_model` sets it. Default: False.

    Raises:
        ValueError: `alpha` or `beta` is not a finite number.

    Paper: Chen et al., arXiv:2006.13858.

    >>> AReLU()(torch.tensor([-1.0, 1.0])).detach()
    tensor([-0.9000,  1.8808])
    """

    def __init__(self, alpha: float = 0.90, beta: float = 2.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([check_finite("alpha", alpha)]))
        self.beta = nn.Parameter(torch.tensor([check_finite("beta", beta)]))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return arelu(x, self.alpha, self.beta, self.inplace)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the positive and the negative slope, each (1,).

        >>> [round(slope.item(), 4) for slope in AReLU().slopes()]
        [1.8808, 0.9]
        """
        return compute_slopes(self.alpha, self.beta)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor that are not defaults."""
        return "inplace=True" if self.inplace else ""


# ---------------------------------------------------------------- callbacks of the entry

# Bounds of beta in a fit, beyond which its gradient would vanish. At the lower bound the positive slope is 1.05, and
# the gradient is a fifth of its maximum.
_LEAST_BETA, _LARGEST_BETA = math.log(0.05 / 0.95), 4.0


@torch.no_grad()
def _fit(module: AReLU, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit the parameters to a target curve on `GRID`, and return the fitted curve."""
    positive, negative = fit_slopes(target)
    beta = max(math.log((positive - 1) / (2 - positive)), _LEAST_BETA) if 1 < positive < 2 else _LEAST_BETA
    beta = _LARGEST_BETA if positive >= 2 else beta
    alpha = min(max(negative, ALPHA_MIN), ALPHA_MAX)
    module.beta.fill_(beta)
    module.alpha.fill_(alpha)
    return torch.where(GRID > 0, (1 + torch.sigmoid(torch.tensor(beta))) * GRID, alpha * GRID)


def _fold(module: AReLU) -> Folded:
    """Return the equivalent `s * leaky_relu(x, a / s)` for the positive slope s and the negative slope a."""
    positive, negative = (slope.item() for slope in compute_slopes(module.alpha.double(), module.beta.double()))
    return Folded(leaky_relu_spec(negative / positive), positive)


def _learned(module: AReLU) -> dict[str, Tensor]:
    """Return the effective parameters: `alpha` clamped to 0.01..0.99, and the sigmoid of `beta`."""
    return {"alpha": module.slopes()[1], "beta": torch.sigmoid(module.beta)}


# ---------------------------------------------------------------- op

ALPHA_MIN, ALPHA_MAX = 0.01, 0.99


@recomputable
def arelu(x: Tensor, alpha: Tensor, beta: Tensor, inplace: bool = False) -> Tensor:
    """Return the AReLU of x, in the dtype and memory format of x.

    Both slopes are positive, so the output has the sign of x. The backward therefore reads only the output, which the
    next layer saves anyway, and x is not saved.

    Args:
        x: Any shape.
        alpha: (1,), the negative slope before it is clamped to 0.01..0.99; outside, its gradient is 0.
        beta: (1,), the logit of the positive slope 1 + sigmoid(beta).
        inplace: Write the output over x, except while a graph is recorded. Valid only if neither another layer nor the
            backward of the layer that computed x reads x; that of BatchNorm or a convolution does not. Default: False.

    Raises:
        RuntimeError: `inplace` is set and x is a leaf that requires a gradient (raised by torch).

    Paper: Chen et al., arXiv:2006.13858.

    >>> arelu(torch.tensor([-1.0, 1.0]), torch.tensor([0.9]), torch.tensor([2.0]))
    tensor([-0.9000,  1.8808])
    """
    if needs_plain_ops(x):
        return plain(x, alpha, beta)  # out of place: a compiler plans memory itself
    if needs_autograd(x, alpha, beta):
        return _AReLU.apply(x, alpha, beta, inplace)
    return _forward(x, alpha, beta, inplace)


def compute_slopes(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative slope, each in the shape of its parameter.

    >>> [round(slope.item(), 4) for slope in compute_slopes(torch.tensor([0.9]), torch.tensor([2.0]))]
    [1.8808, 0.9]
    """
    return 1 + torch.sigmoid(beta), alpha.clamp(ALPHA_MIN, ALPHA_MAX)


def plain(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Compute `arelu` in torch's own differentiable operators."""
    positive, negative = compute_slopes(alpha, beta)
    # prelu needs one dtype, so the product is rounded to the dtype of x, as the output is.
    return F.prelu(positive.to(x.dtype) * x, (negative / positive).to(x.dtype))


class _AReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, inplace: bool) -> Tensor:
        y = _forward(x, alpha, beta, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, alpha, beta)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, alpha, beta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(grad, y, alpha, beta), None)
        backward = _triton_backward if can_use_triton(y) else _cpu_backward if y.is_cpu else _differentiable_backward
        return (*backward(grad, y, alpha, beta), None)


def _forward(x: Tensor, alpha: Tensor, beta: Tensor, inplace: bool) -> Tensor:
    """Compute the forward by the backend for x."""
    if can_use_triton(x):
        return _triton_forward(x, alpha, beta, inplace)
    if x.is_cpu:
        return _cpu_forward(x, alpha, beta, inplace)
    positive, negative = compute_slopes(alpha, beta)
    # The positive slope is the larger one, so AReLU is the maximum of the two lines.
    y = torch.maximum(x * positive, x * negative).to(x.dtype)
    return x.copy_(y) if inplace else y


def _differentiable_backward(grad: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients from the output y in differentiable operators, for double backward."""
    positive, negative = compute_slopes(alpha, beta)
    above = y > 0
    product = grad * y
    at_positive = torch.where(above, product, 0).sum() / positive
    at_negative = torch.where(above, 0, product).sum() / negative
    inside = (alpha >= ALPHA_MIN) & (alpha <= ALPHA_MAX)
    grad_alpha = torch.where(inside, at_negative, 0).to(alpha.dtype)
    grad_beta = (at_positive * (positive - 1) * (2 - positive)).to(beta.dtype)
    return (grad * torch.where(above, positive, negative)).to(y.dtype), grad_alpha, grad_beta


# ---------------------------------------------------------------- CPU


def _read_slopes(alpha: Tensor, beta: Tensor) -> tuple[float, float]:
    """Return the positive and the negative slope as floats.

    On a CPU this needs no synchronisation, and saves six calls on one-element tensors.
    """
    logit = beta.item()
    share = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return 1 + share, min(max(alpha.item(), ALPHA_MIN), ALPHA_MAX)


def _cpu_forward(x: Tensor, alpha: Tensor, beta: Tensor, inplace: bool) -> Tensor:
    """Compute the forward on a CPU, in blocks that fit the cache."""
    positive, negative = _read_slopes(alpha, beta)
    return leaky.forward(x, positive, negative, inplace)


def _cpu_backward(grad: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients on a CPU, in blocks that fit the cache."""
    positive, negative = _read_slopes(alpha, beta)
    grad_x, above, below = leaky.backward(grad, y, positive, negative)
    # These are sums of grad * y; divided by the slope, they are sums of grad * x.
    inside = ALPHA_MIN <= alpha.item() <= ALPHA_MAX
    grad_alpha = torch.full_like(alpha, below / negative if inside else 0.0)
    return grad_x, grad_alpha, torch.full_like(beta, above / positive * (positive - 1) * (2 - positive))


# ---------------------------------------------------------------- Triton

if triton is not None:
    BLOCK = 2048  # 16 elements per thread of 128, two 16-byte loads of a half type

    @triton.jit
    def _load_slopes(alpha, beta, LOWEST: constexpr, HIGHEST: constexpr):  # type: ignore[no-untyped-def]
        positive = 1.0 + tl.sigmoid(tl.load(beta).to(tl.float32))
        return positive, tl.minimum(tl.maximum(tl.load(alpha).to(tl.float32), LOWEST), HIGHEST)

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, y, alpha, beta, count, LOWEST: constexpr, HIGHEST: constexpr, BLOCK: constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        positive, negative = _load_slopes(alpha, beta, LOWEST, HIGHEST)
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        tl.store(y + at, value * tl.where(value > 0, positive, negative), inside)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        grad, y, grad_x, sums, alpha, beta, count, LOWEST: constexpr, HIGHEST: constexpr, BLOCK: constexpr
    ):
        program = tl.program_id(0)
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        positive, negative = _load_slopes(alpha, beta, LOWEST, HIGHEST)
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        value = tl.load(y + at, inside, 0.0).to(tl.float32)
        above = value > 0
        tl.store(grad_x + at, g * tl.where(above, positive, negative), inside)
        product = g * value
        tl.store(sums + program, tl.sum(tl.where(above, product, 0.0)))
        tl.store(sums + tl.num_programs(0) + program, tl.sum(tl.where(above, 0.0, product)))

    @triton.jit
    def _finish_kernel(  # type: ignore[no-untyped-def]
        sums,
        grad_alpha,
        grad_beta,
        alpha,
        beta,
        parts,
        LOWEST: constexpr,
        HIGHEST: constexpr,
        BLOCK: constexpr,
    ):
        """Add up the partial sums of all programs in a fixed order, and write the gradients of alpha and beta."""
        above = tl.zeros((BLOCK,), tl.float32)
        below = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, parts, BLOCK):
            at = start + tl.arange(0, BLOCK)
            above += tl.load(sums + at, at < parts, 0.0)
            below += tl.load(sums + parts + at, at < parts, 0.0)
        positive, negative = _load_slopes(alpha, beta, LOWEST, HIGHEST)
        # These are sums of grad * y; divided by the slope, they are sums of grad * x.
        raw = tl.load(alpha).to(tl.float32)
        tl.store(grad_alpha, tl.where((raw >= LOWEST) & (raw <= HIGHEST), tl.sum(below) / negative, 0.0))
        tl.store(grad_beta, tl.sum(above) / positive * (positive - 1.0) * (2.0 - positive))

    def _launch_forward(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """Launch the forward kernel, which writes its output to y."""
        grid = (triton.cdiv(x.numel(), BLOCK),)
        with device_of(x):
            _forward_kernel[grid](x, y, alpha, beta, x.numel(), ALPHA_MIN, ALPHA_MAX, BLOCK, num_warps=4)

    def _run_forward(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """Launch the forward kernel, and return its output."""
        y = empty_like(x)
        _launch_forward(x, y, alpha, beta)
        return y

    def _run_forward_(x: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """Launch the forward kernel in place."""
        _launch_forward(x, x, alpha, beta)

    def _run_backward(grad: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the backward kernel, and return its gradients."""
        grad_x, grad_alpha, grad_beta = empty_like(y), torch.empty_like(alpha), torch.empty_like(beta)
        parts = triton.cdiv(y.numel(), BLOCK)
        sums = torch.empty(2 * parts, device=y.device)
        limits = ALPHA_MIN, ALPHA_MAX
        with device_of(y):
            _backward_kernel[(parts,)](grad, y, grad_x, sums, alpha, beta, y.numel(), *limits, BLOCK, num_warps=4)
            _finish_kernel[(1,)](sums, grad_alpha, grad_beta, alpha, beta, parts, *limits, 1024, num_warps=4)
        return grad_x, grad_alpha, grad_beta

    _arguments = "Tensor alpha, Tensor beta"
    _forward_op = register_operator(
        "arelu", f"(Tensor x, {_arguments}) -> Tensor", _run_forward, lambda x, alpha, beta: torch.empty_like(x)
    )
    _forward_op_ = register_operator(
        "arelu_", f"(Tensor(a!) x, {_arguments}) -> ()", _run_forward_, lambda x, alpha, beta: None
    )
    _backward_op = register_operator(
        "arelu_backward",
        f"(Tensor grad, Tensor y, {_arguments}) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        lambda grad, y, alpha, beta: (torch.empty_like(y), torch.empty_like(alpha), torch.empty_like(beta)),
    )

    def _triton_forward(x: Tensor, alpha: Tensor, beta: Tensor, inplace: bool) -> Tensor:
        """Call the registered forward operator on a dense input."""
        source = make_dense(x)
        if not inplace:
            return _forward_op(source, alpha, beta)
        _forward_op_(source, alpha, beta)
        return x if source is x else x.copy_(source)

    def _triton_backward(grad: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Call the registered backward operator on dense inputs, and return the gradients."""
        source = make_dense(y)
        return _backward_op(match_layout(grad, source), source, alpha, beta)


ENTRIES = (
    Entry(
        "arelu",
        AReLU,
        "(1 + σ(β))·x for x ≥ 0, clamp(α, 0.01, 0.99)·x for x < 0",
        "Chen et al., arXiv:2006.13858",
        aliases=("attention_relu",),
        fit=_fit,
        fold=_fold,
        homogeneous=True,
        learned=_learned,
        backward_reads_result=lambda _: True,
        folds_to="leaky_relu",
        use_when=(
            "To learn both slopes with two parameters per site. It folds to leaky_relu and so costs nothing once "
            "deployed. In a trained network, start it with init=match: swapped at once, it needs epochs to recover."
        ),
    ),
)
