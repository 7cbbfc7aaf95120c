"""Hard Mish, a piecewise quadratic Mish without exponentials (Misra, github.com/digantamisra98/H-Mish)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.aten import zero_unless_above
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable


class HardMish(nn.Module):
    """Apply `x * clamp(x + 2, 0, 2) / 2`: x where x > 0, 0 where x < -2, and a parabola between.

    At -2 the derivative is 0, as for torch's `hardtanh`.

    Shapes: any to the same.

    Source: Misra, github.com/digantamisra98/H-Mish, and `hard_mish` in timm.

    >>> HardMish()(torch.tensor([-3.0, -1.0, 2.0]))
    tensor([ 0.0000, -0.5000,  2.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return hard_mish(x)


# ---------------------------------------------------------------- op


@recomputable
def hard_mish(x: Tensor) -> Tensor:
    """Return `x * clamp(x + 2, 0, 2) / 2`, in the dtype and memory format of x.

    Args:
        x: Any shape.

    Source: Misra, github.com/digantamisra98/H-Mish.

    >>> hard_mish(torch.tensor([-1.0]))
    tensor([-0.5000])
    """
    return apply_elementwise(_FUNCTION, x)


def _compute_plain(x: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return x * (F.hardtanh(x + 2, 0.0, 2.0) / 2)  # torch's releases differ in the derivative of clamp at its ends


def _forward(x: Tensor, out: Tensor) -> None:
    """Compute a block of the activation, as `x + x * clamp(x, -2, 0) / 2`."""
    torch.addcmul(x, x, _compute_bend(x), value=0.5, out=out)


def _backward(grad: Tensor, x: Tensor, out: Tensor, reduce: Reduce) -> Sequence[Tensor]:
    """Compute a block of the gradient of x: `grad * (1 + clamp(x, -2, 0))` where x > -2, 0 elsewhere."""
    passed = zero_unless_above(grad, x, -2, out=scratch_like(x, 1))
    torch.addcmul(passed, passed, _compute_bend(x), out=out)
    return ()


def _compute_bend(x: Tensor) -> Tensor:
    """Return clamp(x, -2, 0) in a scratch buffer."""
    return torch.clamp(x, -2, 0, out=scratch_like(x))


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "hard_mish",
        HardMish,
        "x·clamp(x + 2, 0, 2) / 2",
        "Misra, github.com/digantamisra98/H-Mish",
        aliases=("h_mish",),
        use_when="To approximate mish without exponentials, on a CPU or a target that has no hardswish.",
        title="Hard Mish",
    ),
)
