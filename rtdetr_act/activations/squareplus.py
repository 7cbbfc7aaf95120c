"""Squareplus, a smooth ReLU without exponentials (Barron, arXiv:2112.11687)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_positive
from rtdetr_act.activations.exporting import make_exportable
from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.backend import compute_dtype
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

# Up to here, x² is finite in float32; beyond, sqrt(x² + b) is |x|.
LARGEST = 1e18


class Squareplus(nn.Module):
    """Apply `(x + sqrt(x² + b)) / 2`, a smooth ReLU that is positive everywhere.

    Shapes: any to the same.

    Args:
        b: How round the corner at 0 is, a constant. Default: 4.0, with which the second derivative at 0 is that of
            softplus; the paper also names 4 ln(2)² = 1.92, with which the value is.

    Raises:
        ValueError: `b` is not a positive number.

    Paper: Barron, arXiv:2112.11687.

    >>> Squareplus()(torch.tensor([-1.5, 0.0, 1.5]))
    tensor([0.5000, 1.0000, 2.0000])
    """

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        self.b = check_positive("b", b)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return squareplus(x, self.b)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return f"b={self.b:g}"


# ---------------------------------------------------------------- callbacks of the entry


def _export(module: Squareplus, x: Tensor) -> Tensor:
    """Return the activation of x without an overflow in float16, whose largest square is that of 255."""
    return torch.relu(x) + (module.b / 2) / (torch.sqrt(x * x + module.b) + x.abs())


# ---------------------------------------------------------------- op


@recomputable
def squareplus(x: Tensor, b: float = 4.0) -> Tensor:
    """Return `(x + sqrt(x² + b)) / 2`, in the dtype and memory format of x.

    Args:
        x: Any shape.
        b: A positive number. Default: 4.0.

    Paper: Barron, arXiv:2112.11687.

    >>> squareplus(torch.tensor([1.5]))
    tensor([2.])
    """
    return apply_elementwise(_FUNCTION, x, torch.full((1,), b, dtype=compute_dtype(x.dtype), device=x.device))


def smooth_abs(x: Tensor, b: Tensor) -> Tensor:
    """Return `sqrt(x² + b)` in torch's own differentiable operators, without an overflow.

    Args:
        x: Any shape.
        b: (1,), positive.

    >>> smooth_abs(torch.tensor([1.5, 1e30]), torch.tensor([4.0]))
    tensor([2.5000e+00, 1.0000e+30])
    """
    near = x.clamp(-LARGEST, LARGEST)
    return torch.sqrt(near * near + b) + (x - near).abs()


def _compute_plain(x: Tensor, b: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return (x + smooth_abs(x, b)) / 2


def _forward(x: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute a block of the activation, as `max(x, 0) + b / 2 / (|x| + sqrt(x² + b))`, where nothing cancels."""
    root = torch.addcmul(b, x, x, out=scratch_like(x)).sqrt_()
    other = torch.abs(x, out=scratch_like(x, 1))
    root.add_(other)
    torch.addcdiv(torch.clamp_min(x, 0, out=other), b / 2, root, out=out)


def _backward(grad: Tensor, x: Tensor, b: Tensor, out: Tensor, reduce: Reduce) -> list[Tensor]:
    """Compute a block of the gradient of x: `grad * (1 + x / sqrt(x² + b)) / 2`; b is a constant."""
    near = torch.clamp(x, -LARGEST, LARGEST, out=scratch_like(x))
    root = torch.addcmul(b, near, near, out=scratch_like(x, 1)).sqrt_()
    half = torch.mul(grad, 0.5, out=scratch_like(x, 2))
    torch.addcmul(half, half, near.div_(root), out=out)
    return [torch.zeros_like(b)]


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "squareplus",
        Squareplus,
        "(x + √(x² + b)) / 2, b = 4",
        "Barron, arXiv:2112.11687",
        exportable=make_exportable(_export),
        use_when="As softplus, with additions, products and a root only; unusual in detectors.",
        title="Squareplus",
    ),
)
