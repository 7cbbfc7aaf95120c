"""Squared ReLU (So et al., NeurIPS 2021, arXiv:2109.08668)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtdetr_act.activations.protocol import Entry
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

# Two epochs of yolo11n on the embedded shapes: finite losses in training, NaN in validation.
OVERFLOWS = "squares outliers at every layer, which overflow in deep convolutional networks outside of training"


class SquaredReLU(nn.Module):
    """Apply `max(x, 0) ** 2`.

    In float16 the result is infinite for x of 256 and more.

    Shapes: any to the same.

    Paper: So et al. (Primer), NeurIPS 2021, arXiv:2109.08668.

    >>> SquaredReLU()(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return squared_relu(x)


# ---------------------------------------------------------------- op


@recomputable
def squared_relu(x: Tensor) -> Tensor:
    """Return `max(x, 0) ** 2`, in the dtype and memory format of x.

    Args:
        x: Any shape.

    Paper: So et al., NeurIPS 2021, arXiv:2109.08668.

    >>> squared_relu(torch.tensor([3.0]))
    tensor([9.])
    """
    return apply_elementwise(_FUNCTION, x)


def _compute_plain(x: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return torch.relu(x).square()


def _forward(x: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    positive = torch.clamp_min(x, 0, out=scratch_like(x))
    torch.mul(positive, positive, out=out)  # torch.square does not cast its result in torch 2.4


def _backward(grad: Tensor, x: Tensor, out: Tensor, reduce: Reduce) -> Sequence[Tensor]:
    """Compute a block of the gradient of x."""
    positive = torch.clamp_min(x, 0, out=scratch_like(x))
    torch.mul(positive.mul_(2), grad, out=out)
    return ()


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "squared_relu",
        SquaredReLU,
        "max(x, 0)²",
        "So et al. (Primer), NeurIPS 2021, arXiv:2109.08668",
        OVERFLOWS,
        aliases=("relu2", "relu_squared", "sqr_relu"),
        use_when=(
            "At a few sites, such as transformer layers, for which it was found. In a network trained with another "
            "activation the sizes of its outputs change: train from scratch."
        ),
        title="Squared ReLU",
    ),
)
