"""AReLU: attention-based rectified linear unit (Chen, Li & Xu, arXiv:2006.13858)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.channels import check_finite
from rtdetr_act.kernels import arelu as ops


class AReLU(nn.Module):
    """Amplify positive inputs and damp negative ones, both by a learned factor: two scalars per site.

    `f(x) = clamp(alpha, 0.01, 0.99) * x` for x < 0 and `(1 + sigmoid(beta)) * x` for x >= 0. The clamp passes no
    gradient outside its range, as in the paper.

    Shapes: any to the same. `alpha` and `beta` are (1,), shared over channels and positions.

    Args:
        alpha: Start of the negative slope, 0.90 by default.
        beta: Start of the logit of the positive slope, 2.0 by default, which is a slope of 1.8808.
        inplace: Write the result over the input, False by default: one map less in memory. Valid only behind a layer
            whose backward does not read its output, such as BatchNorm; `patch_model` sets it there by itself.

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
        """Return the activation of x, in the type of x."""
        return ops.arelu(x, self.alpha, self.beta, self.inplace)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the positive and the negative slope, each (1,).

        >>> [round(slope.item(), 4) for slope in AReLU().slopes()]
        [1.8808, 0.9]
        """
        return ops.slopes(self.alpha, self.beta)

    def extra_repr(self) -> str:
        """Return what the constructor was given, where it is not the default."""
        return "inplace=True" if self.inplace else ""
