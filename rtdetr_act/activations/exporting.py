"""Parts of exportable forms: activations in operators that every exporter and runtime knows."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn


class Expression(nn.Module):
    """Apply a function; a module, since it stands where an activation stood."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function of x."""
        return self.function(x)


def expression(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], nn.Module]:
    """Return an `Entry.exportable` from a function of the module and its input."""
    return lambda module: Expression(lambda x: function(module, x))


def scaled_copy(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    """Return a copy of a convolution, its weight and bias times a factor."""
    conv = deepcopy(conv)
    conv.weight.data *= factor
    if conv.bias is not None:
        conv.bias.data *= factor
    return conv


def as_convolution(linear: nn.Linear, factor: float = 1.0) -> nn.Conv2d:
    """Return a Linear as a 1x1 convolution, its weight and bias times a factor."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None].clone())
    conv.bias = nn.Parameter(linear.bias.detach().clone())
    return scaled_copy(conv, factor)
