"""What a convolution and what takes its place know of each other's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.dynamic_conv import DynamicConv2d, restore_conv
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.errors import ModelError
from rtdetr_act.surgery.sites import placed_convolutions


def original_convolution(name: str, module: Any) -> nn.Conv2d:
    """Return the convolution that stood, or stands, at a site: the very one, or one like it.

    Args:
        name: Qualified name, for the error.
        module: What stands there now, a `Conv2d` or what took its place.

    Raises:
        ModelError: A BatchNorm was folded into what took its place.
    """
    if not isinstance(module, DynamicConv2d):
        conv: nn.Conv2d = module
        return conv
    placed = get_placement(module)
    if placed and placed.folded:
        raise ModelError(
            f"the BatchNorm behind {name} was folded into its kernels, which are no longer those of the stock model: "
            "take the model that was fused"
        )
    return restore_conv(module)


def load_plain(model: nn.Module, state: dict[str, Tensor]) -> int:
    """Let dynamic convolutions start from the weights of plain ones of the same names.

    Args:
        model: The model that holds the dynamic ones.
        state: State dict of another one.

    Returns:
        The number of dynamic convolutions that got weights.
    """
    count = 0
    with torch.random.fork_rng(devices=[]):
        for name, conv in placed_convolutions(model):
            weight = state.get(f"{name}.weight")
            if weight is not None and weight.shape == conv.weight.shape[1:]:
                conv.init_from(weight, state.get(f"{name}.bias"))
                count += 1
    return count
