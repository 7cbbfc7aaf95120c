"""Scalar and per-channel parameters of placed activations."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rtdetr_act.surgery.sites import placed_activations

# These hold weights, not slopes: what Ultralytics does with them elsewhere is right for them here.
WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def slopes(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the scalar and per-channel parameters of the activations that a swap placed in a model."""
    for _, activation in placed_activations(model):
        for module in activation.modules():
            if isinstance(module, WEIGHT_LAYERS):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.numel() == max(parameter.shape, default=1):  # one axis at most: (), (C,), (1, C, 1, 1)
                    yield parameter
