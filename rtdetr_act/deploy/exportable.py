"""Activations in operators that exporters know, for those which one of them refuses or gets wrong.

Each equals what it stands for, and is put in its place in the copy that is exported, whatever the format: all of them
have the basic operators. `scripts/parity.py` compares the results.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act.activations.aglu import AGLU, LAMBDA_MIN
from rtdetr_act.activations.dyrelu import DyReLUA, DyReLUB, DyReLUC
from rtdetr_act.activations.glu import GatedLinearUnit
from rtdetr_act.surgery.modules import put
from rtdetr_act.surgery.sites import find_sites


class Expression(nn.Module):
    """Applies a function; a module, since it stands where an activation stood."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function of x."""
        return self.function(x)


class ConvDyReLU(nn.Module):
    """A DY-ReLU for NPUs: a global pooling, two 1x1 convolutions, and a maximum of products and sums, all in 4-D.

    The attention of variant C, `min(HW/3 * softmax(z), 1)` over all positions, is `min(e / (3 mean(e)), 1)` with
    `e = exp(z - max(z))`: neither a reshape nor the size of the map is needed.

    Shapes: (B, C, H, W) to the same.
    """

    def __init__(self, activation: DyReLUA | DyReLUB | DyReLUC) -> None:
        super().__init__()
        self.k, self.lambda_a, self.lambda_b = activation.k, activation.lambda_a, activation.lambda_b
        self.squeeze = _as_convolution(activation.squeeze)
        self.expand = _as_convolution(activation.expand, 0.5)  # tanh(z / 2), with the half in the weights
        self.spatial = None
        if isinstance(activation, DyReLUC):
            self.spatial = _scaled(activation.spatial, 1 / float(activation.temperature()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the feature map x."""
        hidden = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        # Not chunk, whose sizes an exporter would compute from the shape at run time.
        parts = torch.tanh(self.expand(hidden)).split(self.expand.out_channels // (2 * self.k), 1)
        terms = []
        for j, (slope, intercept) in enumerate(zip(parts[: self.k], parts[self.k :], strict=True)):
            slope = _times(slope, self.lambda_a)
            terms.append(x * (slope + 1 if j == 0 else slope) + _times(intercept, self.lambda_b))
        y = reduce(torch.maximum, terms)
        if self.spatial is None:
            return y
        z = self.spatial(x)
        e = torch.exp(z - z.amax((2, 3), keepdim=True))
        return y * (e / (3 * F.adaptive_avg_pool2d(e, 1))).clamp(max=1)


class Gate(nn.Module):
    """The zoo's `glu` with its halves taken apart."""

    def __init__(self, activation: GatedLinearUnit) -> None:
        super().__init__()
        self.proj, self.dim = activation.proj, activation.dim

    def forward(self, x: Tensor) -> Tensor:
        """Return one half times the sigmoid of the other."""
        value, gate = self.proj(x).chunk(2, self.dim)
        return value * torch.sigmoid(gate)


def _as_convolution(linear: nn.Linear, factor: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None].clone())
    conv.bias = nn.Parameter(linear.bias.detach().clone())
    return _scaled(conv, factor)


def _scaled(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    """Return a convolution of its own, its weight and bias times a factor."""
    conv = deepcopy(conv)
    conv.weight.data *= factor
    if conv.bias is not None:
        conv.bias.data *= factor
    return conv


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _as_function(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], nn.Module]:
    """Return a writer from a function of the module and its input."""
    return lambda module: Expression(lambda x: function(module, x))


def _threshold(module: Any, x: Tensor) -> Tensor:
    above = torch.clamp(torch.sign(x - module.threshold), min=0)  # no comparison, which NCNN lacks
    return x * above + (1 - above) * module.value


def _aglu(module: Any) -> nn.Module:
    """Write AGLU, or its gate alone, which is Ultralytics' class of the same name."""
    rate = torch.clamp(module.lambd.detach().double(), min=LAMBDA_MIN)
    kappa, shift, power = (float(value) for value in (module.kappa.detach(), torch.log(rate), 1 / rate))

    def gate(x: Tensor) -> Tensor:
        # exp of logarithms, since the power may be 10,000.
        return torch.exp(F.softplus(shift - kappa * x) * -power)

    return Expression(lambda x: x * gate(x)) if isinstance(module, AGLU) else Expression(gate)


def _hardshrink(module: Any, x: Tensor) -> Tensor:
    return x * torch.clamp(torch.sign(x.abs() - module.lambd), min=0)


# By the name of the class, since one of them is Ultralytics'. PNNX, on the way to NCNN, takes x / (1 + |x|),
# x - tanh(x) and softmax(-x) for the functions that they are, and then finds no layer: hence their other forms.
_WRITERS: dict[str, Callable[[Any], nn.Module]] = {
    **dict.fromkeys(("DyReLUA", "DyReLUB", "DyReLUC"), ConvDyReLU),  # a comparison, which NCNN lacks
    "GatedLinearUnit": Gate,  # NaN in NCNN
    "AGLU": _aglu,  # Ultralytics' has a softplus with a negative beta: NaN in OpenVINO, unknown to NCNN
    "Hardshrink": _as_function(_hardshrink),  # unknown to OpenVINO
    "Softshrink": _as_function(lambda m, x: x - x.clamp(-m.lambd, m.lambd)),  # unknown to OpenVINO
    "Threshold": _as_function(_threshold),  # in ONNX with a threshold of 0 only, unknown to OpenVINO and NCNN
    "Softsign": _as_function(lambda _, x: x * (x.abs() + 1).reciprocal()),  # unknown to NCNN
    "Tanhshrink": _as_function(lambda _, x: (torch.tanh(x) - x) * -1),  # unknown to NCNN
    "LogSigmoid": _as_function(lambda _, x: F.softplus(x * -1) * -1),  # log(sigmoid(x)) in ONNX, -inf from -104 on
    "Softmin": _as_function(lambda m, x: torch.softmax(x * -1, m.dim)),  # unknown to NCNN
}


def write_out(model: nn.Module) -> int:
    """Replace, in place, the activations of a model that some exporter has to be given in other operators.

    The others no longer work in place, which is of no use in a graph: PNNX crashes on an ELU that does.

    Args:
        model: A copy to export.

    Returns:
        How many were replaced.
    """
    count = 0
    for site in find_sites(model):
        if hasattr(site.activation, "inplace"):
            site.activation.inplace = False
        if write := _WRITERS.get(type(site.activation).__name__):
            put(site.owner, site.attribute, _like(write(site.activation), site.activation))
            count += 1
    return count


def _like(module: nn.Module, other: nn.Module) -> nn.Module:
    parameter = next(other.parameters(), None)
    return module.train(other.training) if parameter is None else module.train(other.training).to(parameter)
