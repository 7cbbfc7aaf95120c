"""GoLU: the input times the Gompertz function (Das et al., NeurIPS 2025, arXiv:2502.03654)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

# x in the formula is at least this, where the gate is 4e-36. Below, exp(-x) overflows and its product with the gate is
# NaN, or the gate underflows, for which torch's exp takes 300 times as long on a CPU with MKL.
LEAST = -4.4


class GoLU(nn.Module):
    """Multiply x by the Gompertz function: `x * exp(-exp(-x))`.

    The gate is the distribution function of the Gumbel distribution, which approaches 0 sooner than 1.

    Shapes: any to the same.

    Paper: Das et al., NeurIPS 2025, arXiv:2502.03654.

    >>> GoLU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.0660,  0.0000,  0.6922])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return golu(x)


# ---------------------------------------------------------------- op


@recomputable
def golu(x: Tensor) -> Tensor:
    """Return `x * exp(-exp(-x))`, in the dtype and memory format of x.

    Args:
        x: Any shape.

    Paper: Das et al., NeurIPS 2025, arXiv:2502.03654.

    >>> golu(torch.tensor([1.0]))
    tensor([0.6922])
    """
    return apply_elementwise(_FUNCTION, x)


def _compute_plain(x: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    x = x.clamp(min=LEAST)
    return x * torch.exp(-torch.exp(-x))


def _forward(x: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    clamped = torch.clamp_min(x, LEAST, out=scratch_like(x))
    gate = torch.neg(clamped, out=scratch_like(x, 1)).exp_().neg_().exp_()
    torch.mul(gate, clamped, out=out)


def _backward(grad: Tensor, x: Tensor, out: Tensor, reduce: Reduce) -> Sequence[Tensor]:
    """Compute a block of the gradient of x: `grad * gate * (1 + x * exp(-x))`."""
    clamped = torch.clamp_min(x, LEAST, out=scratch_like(x))
    decay = torch.neg(clamped, out=scratch_like(x, 1)).exp_()
    gate = torch.neg(decay, out=scratch_like(x, 2)).exp_()
    slope = gate.addcmul_(decay.mul_(gate), clamped)
    torch.mul(slope, grad, out=out)
    return ()


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "golu",
        GoLU,
        "x·exp(−exp(−x))",
        "Das et al., NeurIPS 2025, arXiv:2502.03654",
        aliases=("gompertz_linear_unit",),
        use_when="As a smooth alternative to silu and gelu without parameters, with less output for inputs below 0.",
        title="GoLU",
    ),
)
