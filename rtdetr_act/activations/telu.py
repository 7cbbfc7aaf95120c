"""TeLU: the input times tanh of its exponential (Fernandez and Mali, arXiv:2412.20269)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.aten import tanh_backward_
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

# exp(x) overflows for x above 88 in float32, and its product with 1 - tanh² is NaN. At this x, tanh(exp(x)) is 1 in
# every floating-point type, and exp(x) is within float16.
LARGEST = 10.0


class TeLU(nn.Module):
    """Multiply x by a gate that rises from 0 to 1: `x * tanh(exp(x))`.

    Shapes: any to the same.

    Paper: Fernandez and Mali, arXiv:2412.20269.

    >>> TeLU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3521,  0.0000,  0.9913])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return telu(x)


# ---------------------------------------------------------------- op


@recomputable
def telu(x: Tensor) -> Tensor:
    """Return `x * tanh(exp(x))`, in the dtype and memory format of x.

    Args:
        x: Any shape.

    Paper: Fernandez and Mali, arXiv:2412.20269.

    >>> telu(torch.tensor([1.0]))
    tensor([0.9913])
    """
    return apply_elementwise(_FUNCTION, x)


def _compute_plain(x: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return x * torch.tanh(torch.exp(x.clamp(max=LARGEST)))


def _forward(x: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    torch.mul(torch.exp(x, out=scratch_like(x)).tanh_(), x, out=out)


def _backward(grad: Tensor, x: Tensor, out: Tensor, reduce: Reduce) -> Sequence[Tensor]:
    """Compute a block of the gradient of x: `grad * (gate + x * exp(x) * (1 - gate²))`."""
    growth = torch.clamp_max(x, LARGEST, out=scratch_like(x)).exp_()
    gate = torch.tanh(growth, out=scratch_like(x, 1))
    through_gate = tanh_backward_(growth, gate)
    torch.mul(gate.addcmul_(through_gate, x), grad, out=out)
    return ()


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "telu",
        TeLU,
        "x·tanh(eˣ)",
        "Fernandez and Mali, arXiv:2412.20269",
        use_when="As a smooth alternative to relu without parameters, closer to it for x > 0 than silu.",
        title="TeLU",
    ),
)
