"""The activations that the benchmarks compare: what each has to move, and the forms that people copy, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("arelu", "prelu", "frelu", "aconc", "meta_aconc", "dyrelu_a", "dyrelu_b", "dyrelu_c")
# Maps read and written, forward and backward. SiLU: x, y; grad, x, grad_x. A pooling reads x once more, and its
# gradient is added to that of x (read, written). DY-ReLU-C's 1x1 convolution reads x in both directions, and its
# gradient is added too. FReLU: convolution, BatchNorm and maximum, each with its own backward.
MOVED = {
    "silu": 5, "arelu": 5, "prelu": 5, "aconc": 5, "meta_aconc": 8, "dyrelu_a": 8, "dyrelu_b": 8, "dyrelu_c": 12,
    "frelu": 21, "aglu": 5,
}  # fmt: skip


class PublishedAReLU(nn.Module):
    """AReLU as in its paper: two rectified copies, each with a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        return (1 + torch.sigmoid(self.beta)) * F.relu(x) - self.alpha.clamp(0.01, 0.99) * F.relu(-x)


class PublishedDyReLU(nn.Module):
    """DY-ReLU by a permutation to channels last, a dimension more for the K terms, and a maximum over that."""

    per_channel = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden, outputs = max(channels // 8, 1), 4 * (channels if self.per_channel else 1)
        self.generator = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Sigmoid())
        self.register_buffer("scale", torch.tensor([1.0, 1.0, 0.5, 0.5]))
        self.register_buffer("start", torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def coefficients(self, x: Tensor) -> Tensor:
        """Return (B, C, 4), of variant A (B, 1, 4): two slopes and two intercepts."""
        theta = 2 * self.generator(x.mean(-1).mean(-1)) - 1
        return theta.view(x.shape[0], -1, 4) * self.scale + self.start

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        theta = self.coefficients(x)
        terms = x.permute(2, 3, 0, 1).unsqueeze(-1) * theta[..., :2] + theta[..., 2:]
        return terms.max(-1)[0].permute(2, 3, 0, 1)


class PublishedDyReLUA(PublishedDyReLU):
    """Variant A of it."""

    per_channel = False


class PublishedDyReLUB(PublishedDyReLU):
    """Variant B of it."""


class PublishedDyReLUC(PublishedDyReLU):
    """Variant C of it: the coefficients of B times an attention over positions, broadcast over all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        batch, _, height, width = x.shape
        share = torch.softmax(self.spatial(x).view(batch, -1) / 10, 1) * (height * width / 3)
        pi = share.clamp(max=1).view(batch, height, width).permute(1, 2, 0)[..., None, None]
        theta = self.coefficients(x) * pi
        terms = x.permute(2, 3, 0, 1).unsqueeze(-1) * theta[..., :2] + theta[..., 2:]
        return terms.max(-1)[0].permute(2, 3, 0, 1)


class PublishedACON(nn.Module):
    """ACON-C as in its paper, the difference of slopes times x written twice; Meta-ACON with a generator."""

    def __init__(self, channels: int, meta: bool = False) -> None:
        super().__init__()
        self.p1, self.p2 = (nn.Parameter(torch.randn(1, channels, 1, 1)) for _ in range(2))
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1))
        hidden = max(channels // 16, 16)
        layers = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        self.generator = nn.Sequential(*layers) if meta else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        beta = self.beta if self.generator is None else self.generator(x.mean((2, 3), keepdim=True))
        return (self.p1 * x - self.p2 * x) * torch.sigmoid(beta * (self.p1 * x - self.p2 * x)) + self.p2 * x


class PublishedFReLU(nn.Module):
    """FReLU as in its paper."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        return torch.max(x, self.bn(self.conv(x)))


class PublishedAGLU(nn.Module):
    """AGLU as its formula stands, by softplus."""

    def __init__(self) -> None:
        super().__init__()
        self.lambd, self.kappa = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x."""
        rate = self.lambd.clamp(min=0.0001)
        return x * torch.exp(-F.softplus(torch.log(rate) - self.kappa * x) / rate)


PUBLISHED: dict[str, Callable[[int], nn.Module]] = {
    "arelu": lambda channels: PublishedAReLU(),
    "aglu": lambda channels: PublishedAGLU(),
    "prelu": lambda channels: nn.PReLU(),
    "frelu": PublishedFReLU,
    "aconc": PublishedACON,
    "meta_aconc": lambda channels: PublishedACON(channels, meta=True),
    "dyrelu_a": PublishedDyReLUA,
    "dyrelu_b": PublishedDyReLUB,
    "dyrelu_c": PublishedDyReLUC,
}


def both_ways(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Return a call of a module's forward and backward, with the gradients of x and of all parameters."""
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(module(leaf), wanted, grad, allow_unused=True)
