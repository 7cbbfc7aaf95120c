"""StarReLU, a squared ReLU with a learned scale and bias (Yu et al., arXiv:2210.13452)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_finite
from rtdetr_act.activations.fitting import fit_curve
from rtdetr_act.activations.protocol import GRID, Entry
from rtdetr_act.activations.squared_relu import OVERFLOWS
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable


class StarReLU(nn.Module):
    """Apply `scale * max(x, 0) ** 2 + bias` with a learned scale and bias.

    The initial values give a standard normal input a result with mean 0 and variance 1. The authors' code starts from a
    scale of 1 and a bias of 0 instead, which is squared ReLU.

    Shapes: any to the same. `scale` and `bias` are (1,), shared by all channels and positions.

    Args:
        scale: Initial scale. Default: 0.8944.
        bias: Initial bias. Default: -0.4472.

    Raises:
        ValueError: `scale` or `bias` is not a finite number.

    Paper: Yu et al. (MetaFormer Baselines), TPAMI 2024, arXiv:2210.13452.

    >>> StarReLU()(torch.tensor([-1.0, 1.0])).detach()
    tensor([-0.4472,  0.4472])
    """

    def __init__(self, scale: float = 0.8944, bias: float = -0.4472) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([check_finite("scale", scale)]))
        self.bias = nn.Parameter(torch.tensor([check_finite("bias", bias)]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        return star_relu(x, self.scale, self.bias)


# ---------------------------------------------------------------- callbacks of the entry

_LARGEST = 10.0  # of a fitted scale or bias; those of common activations are below 1


def _evaluate_on_grid(scale: Tensor, bias: Tensor) -> Tensor:
    """Return the activation on `GRID`, (1201,), for scalar parameters."""
    return scale * GRID.clamp(min=0) ** 2 + bias


@torch.no_grad()
def _fit(module: StarReLU, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit scale and bias to a target curve on `GRID`, and return the fitted curve."""
    (scale, bias), curve = fit_curve(_evaluate_on_grid, target, (1.0, 0.0), (-_LARGEST,) * 2, (_LARGEST,) * 2)
    module.scale.fill_(scale)
    module.bias.fill_(bias)
    return curve


# ---------------------------------------------------------------- op


@recomputable
def star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return `scale * max(x, 0) ** 2 + bias`, in the dtype and memory format of x.

    Args:
        x: Any shape.
        scale: (1,).
        bias: (1,).

    Paper: Yu et al., arXiv:2210.13452.

    >>> star_relu(torch.tensor([3.0]), torch.ones(1), -torch.ones(1))
    tensor([8.])
    """
    return apply_elementwise(_FUNCTION, x, scale, bias)


def _compute_plain(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return scale * torch.relu(x).square() + bias


def _forward(x: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    squared = torch.clamp_min(x, 0, out=scratch_like(x)).square_()
    torch.add(squared.mul_(scale), bias, out=out)  # addcmul is not vectorised for two numbers


def _backward(grad: Tensor, x: Tensor, scale: Tensor, bias: Tensor, out: Tensor, reduce: Reduce) -> list[Tensor]:
    """Compute a block of the gradient of x, and return those of scale and bias."""
    positive = torch.clamp_min(x, 0, out=scratch_like(x))
    product = torch.mul(grad, positive, out=scratch_like(x, 1))
    for_scale = reduce(product, positive)
    torch.mul(product, 2 * scale, out=out)
    return [for_scale, grad.sum()]


_FUNCTION = Elementwise(_compute_plain, _forward, _backward)


ENTRIES = (
    Entry(
        "star_relu",
        StarReLU,
        "s·max(x, 0)² + b, from s = 0.8944, b = −0.4472",
        "Yu et al. (MetaFormer Baselines), TPAMI 2024, arXiv:2210.13452",
        OVERFLOWS,
        fit=_fit,
        use_when=(
            "As squared_relu, with outputs of mean 0 and variance 1 at first; it was designed for networks with "
            "LayerNorm. In a trained network, start it with init=match."
        ),
        start="squared ReLU with mean 0 and variance 1",
        title="StarReLU",
    ),
)
