"""Scalar and per-channel parameters of the activations in a patched model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rtdetr_act.surgery.sites import iterate_placed_activations

# Layers inside activations whose weights and biases are treated as those of any other layer.
WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def find_scalar_and_channel_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the scalar and per-channel parameters of all activations that a swap inserted into a model."""
    for _, activation in iterate_placed_activations(model):
        for module in activation.modules():
            if isinstance(module, WEIGHT_LAYERS):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.numel() == max(parameter.shape, default=1):  # such as (), (C,) and (1, C, 1, 1)
                    yield parameter
