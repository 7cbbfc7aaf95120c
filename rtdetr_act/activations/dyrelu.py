"""Dynamic ReLU in its variants A, B and C (Chen et al., ECCV 2020, arXiv:2003.10027)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.channels import check_count, check_positive
from rtdetr_act.activations.temperature import Temperature
from rtdetr_act.kernels.dyrelu import dyrelu
from rtdetr_act.kernels.logits import logits
from rtdetr_act.kernels.pool import mean_over_positions
from rtdetr_act.spec import TAU_EPOCHS


class _DyReLU(nn.Module):
    """What the variants share: `y = max_k(a^k(x) * x + b^k(x))` with coefficients from the pooled input.

    The last Linear starts at zero, so that every delta is 0 and the site starts as exactly ReLU (max(x, 0)): the
    paper's alpha = (1, 0, …) and beta = 0. From the second step on the first Linear learns as well. With K > 2 the
    branches from the second on would stay equal for ever, so that Linear's weight then starts at N(0, 0.001²).
    """

    per_channel = True

    def __init__(
        self, channels: int, reduction: int = 8, k: int = 2, lambda_a: float = 1.0, lambda_b: float = 0.5
    ) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.reduction = check_count("reduction", reduction)
        self.k = check_count("k", k)
        self.lambda_a = check_positive("lambda_a", lambda_a, or_zero=True)
        self.lambda_b = check_positive("lambda_b", lambda_b, or_zero=True)
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, 2 * k * (channels if self.per_channel else 1))
        nn.init.zeros_(self.expand.bias)
        if k > 2:
            nn.init.normal_(self.expand.weight, std=1e-3)
        else:
            nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x, in the type of x."""
        return self.held_at(x)(x)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the elementwise function that stands at x: the activation with its coefficients held constant."""
        slopes, intercepts = self.coefficients(x)
        return partial(dyrelu, slopes=slopes, intercepts=intercepts)

    def coefficients(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the K slopes and the K intercepts for (B, C, H, W), each (B, C, 1, 1), of variant A (B, 1, 1, 1)."""
        pooled = mean_over_positions(x, self.squeeze.weight.dtype)
        # 2 * sigmoid(z) - 1 is tanh(z / 2), which keeps small deltas: in bfloat16 the former is a multiple of 0.004.
        deltas = torch.tanh(0.5 * self.expand(F.relu(self.squeeze(pooled))))
        parts = deltas[:, :, None, None].chunk(2 * self.k, 1)
        slopes = [_scaled(part, self.lambda_a) for part in parts[: self.k]]
        return [slopes[0] + 1, *slopes[1:]], [_scaled(part, self.lambda_b) for part in parts[self.k :]]

    def named_coefficients(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the input decides, by name: `a1` … `aK` and `b1` … `bK`, each (B, C, 1, 1) or (B, 1, 1, 1).

        >>> list(DyReLUB(8).named_coefficients(torch.randn(2, 8, 3, 3)))
        ['a1', 'a2', 'b1', 'b2']
        """
        both = zip("ab", self.coefficients(x), strict=True)
        return {f"{letter}{index}": part for letter, parts in both for index, part in enumerate(parts, 1)}

    def extra_repr(self) -> str:
        """Return what the constructor was given."""
        return (
            f"{self.channels}, reduction={self.reduction}, k={self.k}, "
            f"lambda_a={self.lambda_a:g}, lambda_b={self.lambda_b:g}"
        )


class DyReLUA(_DyReLU):
    """Dynamic ReLU, variant A: one set of 2K coefficients per image, shared by its channels and positions.

    Shapes: (B, C, H, W) to the same. Starts as exactly ReLU.

    Args:
        channels: C.
        reduction: R, the pooled C values go through max(C // R, 1), 8 by default (published code also uses 4).
        k: Number of affine terms under the maximum, 2 by default.
        lambda_a: Range of the slopes around (1, 0, …), 1.0 by default.
        lambda_b: Range of the intercepts around 0, 0.5 by default.

    Raises:
        ValueError: A count is below 1 or a lambda is negative.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> x = torch.randn(2, 16, 4, 4)
    >>> torch.equal(DyReLUA(16)(x), torch.relu(x))
    True
    """

    per_channel = False


class DyReLUB(_DyReLU):
    """Dynamic ReLU, variant B: 2K coefficients per image and channel, shared by the positions.

    Shapes: (B, C, H, W) to the same. Starts as exactly ReLU.

    Args:
        channels: C.
        reduction: R, the pooled C values go through max(C // R, 1), 8 by default.
        k: Number of affine terms under the maximum, 2 by default.
        lambda_a: Range of the slopes around (1, 0, …), 1.0 by default.
        lambda_b: Range of the intercepts around 0, 0.5 by default.

    Raises:
        ValueError: A count is below 1 or a lambda is negative.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> DyReLUB(16, reduction=4)
    DyReLUB(
      16, reduction=4, k=2, lambda_a=1, lambda_b=0.5
      (squeeze): Linear(in_features=16, out_features=4, bias=True)
      (expand): Linear(in_features=4, out_features=64, bias=True)
    )
    """


class DyReLUC(_DyReLU):
    """Dynamic ReLU, variant C: the coefficients of B times a spatial attention pi of each image.

    `pi = min(gamma * softmax_over_HW(z / tau), 1)`, gamma = H * W / 3, z a 1x1 convolution to one channel.

    The softmax sums to 1, so pi is 1/3 on average at most: this variant starts as about ReLU / 3. That is the
    paper's formula; the BatchNorm after the next convolution takes the factor up.

    Shapes: (B, C, H, W) to the same.

    Args:
        channels: C.
        reduction: R, the pooled C values go through max(C // R, 1), 8 by default.
        k: Number of affine terms under the maximum, 2 by default.
        lambda_a: Range of the slopes around (1, 0, …), 1.0 by default.
        lambda_b: Range of the intercepts around 0, 0.5 by default.
        tau: Temperature of the softmax, 10 by default.
        tau_start: Temperature before the first step, from which it goes evenly to `tau`; None (default) for no way.
        tau_epochs: Epochs that this takes, 10 by default as in dynamic convolution.

    Raises:
        ValueError: A count is below 1, a lambda is negative or a temperature or `tau_epochs` is not positive.

    Paper: Chen et al., ECCV 2020, arXiv:2003.10027.

    >>> DyReLUC(16)(torch.randn(2, 16, 4, 4)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        k: int = 2,
        lambda_a: float = 1.0,
        lambda_b: float = 0.5,
        tau: float = 10.0,
        *,
        tau_start: float | None = None,
        tau_epochs: float = TAU_EPOCHS,
    ) -> None:
        super().__init__(channels, reduction, k, lambda_a, lambda_b)
        self.temperature = Temperature(tau, tau_start, tau_epochs)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def held_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the elementwise function that stands at x: coefficients and attention held constant."""
        # pi >= 0, so max_k(pi * (a x + b)) = pi * max_k(a x + b): one product instead of 2K.
        slopes, intercepts = self.coefficients(x)
        return partial(dyrelu, slopes=slopes, intercepts=intercepts, attention=self.attention(x))

    def named_coefficients(self, x: Tensor) -> dict[str, Tensor]:
        """Return those of variant B and `pi`, (B, 1, H, W)."""
        return {**super().named_coefficients(x), "pi": self.attention(x)}

    def attention(self, x: Tensor) -> Tensor:
        """Return pi, (B, 1, H, W) in 0..1, in float32 at least."""
        # Over all positions of an image; a widely copied version takes z as (N, C, -1). In float32 at least, because
        # 1 / (H * W) of a 160x160 map is below the smallest normal number of float16.
        z = logits(x, self.spatial.weight, cast(Tensor, self.spatial.bias))
        share = torch.softmax(z.flatten(1) / self.temperature(), dim=1)
        return (share * (x.shape[2] * x.shape[3] / 3)).clamp(max=1).view_as(z)


def _scaled(part: Tensor, factor: float) -> Tensor:
    return part if factor == 1 else factor * part
