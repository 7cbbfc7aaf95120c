"""Exchange of weights between a convolution and the dynamic convolution that replaces it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.dynamic_conv import DynamicConv2d, restore_conv
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import ModelError
from rtdetr_act.surgery.sites import iterate_placed_convolutions


def get_original_convolution(name: str, module: Any) -> nn.Conv2d:
    """Return the plain convolution of a site: the module itself, or the one that it replaced.

    Args:
        name: Qualified name of the site, for the error message.
        module: The module at the site, a `Conv2d` or a dynamic convolution.

    Raises:
        ModelError: A BatchNorm was folded into the dynamic convolution.
    """
    if not isinstance(module, DynamicConv2d):
        conv: nn.Conv2d = module
        return conv
    placed = get_placement(module)
    if placed and placed.folded:
        raise ModelError(
            f"the BatchNorm after {name} was folded into its kernels, so the convolution cannot be restored: use the "
            "model from before fusing"
        )
    return restore_conv(module)


def load_plain_weights(model: nn.Module, state: dict[str, Tensor]) -> int:
    """Initialise dynamic convolutions from a state dict that has plain convolutions under the same names.

    Args:
        model: The model with dynamic convolutions, changed in place.
        state: The state dict.

    Returns:
        The number of dynamic convolutions that were initialised.
    """
    count = 0
    with torch.random.fork_rng(devices=[]):
        for name, conv in iterate_placed_convolutions(model):
            weight = state.get(f"{name}.weight")
            if weight is not None and weight.shape == conv.weight.shape[1:]:
                conv.init_from(weight, state.get(f"{name}.bias"))
                count += 1
    return count
