"""Activations of the zoo that equal, in evaluation, one of torch's own, up to a positive factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_act.activations.acon import AconC
from rtdetr_act.activations.aglu import AGLU
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.kernels.arelu import slopes
from rtdetr_act.spec import ActSpec

# Positively homogeneous, f(k x) = k f(x) for k > 0: a factor on their input is one on their output.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity, AReLU)


@dataclass(frozen=True)
class Form:
    """What an activation is in evaluation: `scale` times an activation of torch.

    Attributes:
        activation: The activation of torch, homogeneous where `scale` is not 1.
        scale: A positive factor.
    """

    activation: ActSpec
    scale: float = 1.0


def torch_form(module: object) -> Form | None:
    """Return the activation of torch that a module equals in evaluation, None where there is none but itself.

    AReLU is `s * leaky_relu(x, a / s)` with slopes s > 0 and a; a PReLU of one slope is LeakyReLU, an RReLU its mean
    slope, ACON-C with p1 = 1, p2 = 0 and beta = 1 is SiLU, and so is AGLU with lambda = kappa = 1. A DY-ReLU never
    trained is ReLU, too, but not here: who measures one means a trained one.

    >>> torch_form(AReLU(beta=0.0)).scale
    1.5
    >>> print(torch_form(nn.RReLU(0.1, 0.3)).activation, torch_form(nn.Hardtanh(0, 6)).activation)
    leaky_relu(negative_slope=0.2) relu6
    >>> torch_form(nn.SiLU()) is None
    True
    """
    if isinstance(module, AReLU):
        positive, negative = (slope.item() for slope in slopes(module.alpha.double(), module.beta.double()))
        return Form(_leaky(negative / positive), positive)
    slope = _negative_slope(module)
    if slope is not None:
        return Form(_leaky(slope))
    name = _name_of(module)
    return None if name is None else Form(ActSpec(name))


def _negative_slope(module: object) -> float | None:
    """Return the slope of a module that is a LeakyReLU in another guise."""
    if isinstance(module, nn.PReLU):
        weight = module.weight.detach().double()
        return float(weight[0]) if bool((weight == weight[0]).all()) else None
    if isinstance(module, nn.RReLU):
        return (module.lower + module.upper) / 2
    return 0.0 if isinstance(module, nn.LeakyReLU) and module.negative_slope == 0 else None


def _leaky(slope: float) -> ActSpec:
    return ActSpec("leaky_relu", kwargs=(("negative_slope", slope),)) if slope else ActSpec("relu")


def _name_of(module: object) -> str | None:
    if isinstance(module, AconC) and _is(module.p1, 1) and _is(module.p2, 0) and _is(module.beta, 1):
        return "silu"
    if isinstance(module, AGLU) and _is(module.lambd, 1) and _is(module.kappa, 1):
        return "silu"
    if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
        return "relu"
    if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
        return "relu6"
    return "elu" if isinstance(module, nn.CELU) and module.alpha == 1 else None


def _is(values: Tensor, number: float) -> bool:
    return bool(torch.all(values == number))
