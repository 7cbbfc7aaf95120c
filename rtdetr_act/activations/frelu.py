"""FReLU: a ReLU whose threshold looks at the neighbourhood (Ma, Zhang & Sun, ECCV 2020, arXiv:2007.11824)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.channels import check_count
from rtdetr_act.kernels.frelu import maximum


class FReLU(nn.Module):
    """Take the maximum of x and a normalised depthwise 3x3 convolution of it: `max(x, BN(DWConv3x3(x)))`.

    The convolution has no bias, which the BatchNorm would cancel.

    Shapes: (B, C, H, W) to the same.

    Args:
        channels: C.

    Raises:
        ValueError: `channels` is below 1.

    Paper: Ma et al., ECCV 2020, arXiv:2007.11824.

    >>> import torch
    >>> x = torch.randn(2, 8, 5, 5)
    >>> bool((FReLU(8)(x) >= x).all())
    True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, in the type of x."""
        return self.held_at(x)(x)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the elementwise function that stands at x: the maximum with a funnel held constant."""
        return partial(maximum, funnel=self._normalise(self.conv(x)))

    def _normalise(self, funnel: Tensor) -> Tensor:
        bn = self.bn
        if bn.training and funnel.shape[0] * funnel.shape[2] * funnel.shape[3] == 1:
            # One value per channel has no variance: torch refuses it, so use the statistics seen so far.
            return F.batch_norm(funnel, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        normalised: Tensor = bn(funnel)
        return normalised

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        return f"{self.channels}"
