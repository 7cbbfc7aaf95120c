"""Building blocks of exportable activations, made of operators that every exporter and runtime supports."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn


class Lambda(nn.Module):
    """Wrap a function of one tensor in a module.

    Args:
        function: Maps the input to the output.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function applied to x."""
        return self.function(x)


def make_exportable(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], nn.Module]:
    """Return an `Entry.exportable` callback that evaluates `function(module, x)`."""
    return lambda module: Lambda(lambda x: function(module, x))


def copy_scaled(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    """Return a copy of a convolution with its weight and bias multiplied by a factor."""
    conv = deepcopy(conv)
    conv.weight.data *= factor
    if conv.bias is not None:
        conv.bias.data *= factor
    return conv


def linear_to_conv(linear: nn.Linear, factor: float = 1.0) -> nn.Conv2d:
    """Return a 1x1 convolution equivalent to a Linear with a bias, its weight and bias multiplied by a factor."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None].clone())
    conv.bias = nn.Parameter(linear.bias.detach().clone())
    return copy_scaled(conv, factor)
