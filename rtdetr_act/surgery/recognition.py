"""Tell whether a module is an activation, by its class or by what it computes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.dynamic_conv import DynamicConv2d
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.temperature import Temperature
from rtdetr_act.errors import reason
from rtdetr_act.surgery.plan import TreatAs, parse_treat_as

GROUP = "rtdetr_act.treat_as"
# Functions that gate or normalise (attention, scores) are not activations to swap; GLU halves the channels.
_NOT_SITES = (
    nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention,
    DynamicConv2d, Temperature,
)  # fmt: skip
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "ultralytics.nn.modules.activation", "rtdetr_act.activations")


def is_activation(
    attribute: str, owner: nn.Module, child: nn.Module, treat_as: Mapping[str, TreatAs] | None = None
) -> bool:
    """Return whether a child module is an activation that can be swapped.

    It is if its class is an activation of torch, Ultralytics or this package, if it is the `act` of an Ultralytics
    convolution, or if `computes_activation`.

    Args:
        attribute: Attribute of the owner that holds it.
        owner: The module that calls it.
        child: The module.
        treat_as: What the user says about classes, by qualified or bare name, which comes first.
    """
    if placement := get_placement(child):  # which may be a sigmoid in the place of an activation
        return placement.replaces == "activation"
    if treatment := get_treatment(child, treat_as or {}):
        return treatment == "activation"
    if isinstance(child, _NOT_SITES):
        return False
    if type(child).__module__.startswith(_ACTIVATION_MODULES):
        return True
    if attribute == "act" and hasattr(type(owner), "default_act") and not isinstance(child, nn.Identity):
        return True
    return computes_activation(child)


def is_declared(module: object, treat_as: Mapping[str, TreatAs]) -> bool:
    """Return whether a module is an activation whatever is done with its result.

    It is if a swap inserted it, its class is of this package, or the user says so.
    """
    own = type(module).__module__.startswith("rtdetr_act.activations")
    return own or get_placement(module) is not None or get_treatment(module, treat_as) == "activation"


def get_treatment(module: object, treat_as: Mapping[str, TreatAs]) -> TreatAs | None:
    """Return what a user says about the class of a module, or of a base class of it, or None."""
    for cls in type(module).__mro__[:-2] if treat_as else ():
        for name in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            if name in treat_as:
                return treat_as[name]
    return None


def computes_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation by what it computes, whoever wrote it.

    It is if it has no parameters, buffers and children, and maps a tensor to one of the same shape, elementwise, by a
    function that is not affine, not random, and not a gate with values from 0 to 1. It is evaluated on a few values in
    evaluation mode, without its hooks.

    >>> from torchvision.ops import Permute
    >>> class Swish(nn.Module):
    ...     def forward(self, x):
    ...         return x * x.sigmoid()
    >>> computes_activation(Swish()), computes_activation(nn.Identity()), computes_activation(Permute([0, 2, 1]))
    (True, False, False)
    """
    # Modules of torch other than its activations are not: resampling, padding, flattening, dropout.
    if type(module).__module__.startswith("torch.") or module._modules or module._parameters or module._buffers:
        return False
    forward = type(module).forward
    if len(_list_required_arguments(forward)) != 2:  # self and the input
        return False
    try:
        # Of a copy, since a module may keep what it was called with.
        evaluated = copy.copy(module)
        vars(evaluated).update(training=False, _parameters={}, _buffers={}, _modules={})
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return _is_elementwise_and_nonlinear(lambda x: forward(evaluated, x))
    except Exception:  # whatever somebody's module raises for an input that it is not made for
        return False


def _list_required_arguments(forward: Any) -> list[str]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _is_elementwise_and_nonlinear(function: Any) -> bool:
    """Return whether a function of tensors is elementwise, deterministic, not affine, and does not map to [0, 1]."""
    # 96 values, of which no dimension has the size of another, and that cover [-8, 8] with both zero and one.
    x = torch.linspace(-8, 7.8333335, 96).view(2, 3, 4, 4)
    y = function(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or not bool(torch.isfinite(y).all()):
        return False
    order = torch.arange(96).mul(37).remainder(96)
    shuffled = function(x.flatten()[order].view_as(x).clone())
    if not torch.allclose(shuffled.flatten(), y.flatten()[order], rtol=1e-5, atol=1e-6):
        return False
    values = y.flatten()
    if torch.allclose(values[2:] - values[1:-1], values[1:-1] - values[:-2], rtol=1e-3, atol=1e-5):  # affine
        return False
    low, high = float(values.min()), float(values.max())
    return not (low >= 0 and high <= 1 and bool((values[1:] >= values[:-1]).all()))


@lru_cache
def get_plugin_treatments() -> Mapping[str, TreatAs]:
    """Return what installed packages say about classes, through the entry-point group `rtdetr_act.treat_as`.

    The object of each entry point is a mapping as `parse_treat_as` takes it.
    """
    found: dict[str, TreatAs] = {}
    for point in entry_points(group=GROUP):
        try:
            found.update(parse_treat_as(point.load()))
        except Exception as error:  # a broken plugin must not stop a training run
            warnings.warn(
                f"the entry point '{point.name}' ({point.value}) of {GROUP} was left out: {reason(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
    return found
