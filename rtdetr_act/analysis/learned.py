"""Learned quantities of the activations in a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.modules import preserve_attributes
from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters
from rtdetr_act.surgery.sites import iterate_placed_activations

Coefficients = Callable[[Any, Tensor], Mapping[str, Tensor]]
SPREAD = "_spread"  # suffix of a quantity's standard deviation between images


_BATCH_SIZE = 16


_LAYER = re.compile(r"(?:^|\.)model\.(\d+)\.")


@dataclass(frozen=True)
class Quantity:
    """A learned quantity of one activation.

    Attributes:
        site: Qualified name of the activation, as in `model.9.m.3.cv2.act`.
        activation: The activation at the site, as the plan names it.
        name: Name of the quantity, such as "alpha".
        value: Its value.
    """

    site: str
    activation: str
    name: str
    value: float

    @property
    def layer(self) -> int | None:
        """Index of the Ultralytics layer that contains the site; None in other models."""
        return layer_index(self.site)


def layer_index(site: str) -> int | None:
    """Return the index of the Ultralytics layer that contains a site, or None in other models.

    Args:
        site: Qualified name of the site.

    >>> layer_index("model.9.m.3.cv2.act"), layer_index("features.0.1")
    (9, None)
    """
    match = _LAYER.search(site)
    return int(match[1]) if match else None


@torch.no_grad()
def read_quantities(model: nn.Module, images: Sequence[Tensor] = (), *, batch: int = _BATCH_SIZE) -> list[Quantity]:
    """Return the learned quantities of all activations placed in a model by a swap.

    AReLU has the effective `alpha`, clamped to [0.01, 0.99], and `beta`, the sigmoid of the stored one. A parameter per
    channel is averaged over the channels; PReLU also has `weight_min` and `weight_max`. The weights that generate
    coefficients from the input (Dynamic ReLU, Meta-ACON) or a condition on it (FReLU) are summarised as
    `weights_norm`, the L2 norm of all of them.

    With images, the generated coefficients are measured in one forward pass in evaluation mode, which leaves the model
    unchanged: `a1`, `a2`, `b1`, `b2` of Dynamic ReLU and `beta` of Meta-ACON, each as the mean over images and
    channels, and as `…_spread`, the standard deviation over images averaged over channels. `pi` of DY-ReLU-C is the
    mean over positions, and `pi_spread` its standard deviation over the positions of an image averaged over images.

    Args:
        model: Task model, or any patched module.
        images: Inputs of the model, each of shape (C, H, W): uint8, which is scaled to [0, 1], or floating point.
        batch: Maximum number of images per forward pass.

    Returns:
        The quantities in the order of the sites; empty for a model without learnable placed activations.

    >>> from rtdetr_act import patch_model
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> _ = patch_model(model, "prelu")
    >>> [(quantity.site, quantity.name, quantity.value) for quantity in read_quantities(model)]
    [('1', 'weight', 0.25)]
    """
    single = {id(parameter) for parameter in find_scalar_and_channel_parameters(model)}
    measured = _measure_coefficients(model, images, batch) if images and has_coefficients(model) else {}
    return [
        Quantity(site, placed.spec, name, value.item())
        for site, activation in iterate_placed_activations(model)
        if (placed := get_placement(activation))
        for name, value in chain(_summarise_parameters(activation, single), measured.get(site, ()))
    ]


def _summarise_parameters(activation: nn.Module, single: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each quantity of one activation.

    Args:
        activation: The module.
        single: IDs of all scalar and per-channel parameters of the model.
    """
    entry = find_entry(activation)
    if entry and entry.learned:
        yield from entry.learned(activation).items()
        return
    weights = []
    for name, parameter in activation.named_parameters():
        if id(parameter) in single:
            yield name, parameter.float().mean()
        else:
            weights.append(parameter.float().norm())
    if weights:
        yield "weights_norm", torch.stack(weights).norm()


def has_coefficients(model: nn.Module) -> bool:
    """Return whether a model has placed activations that generate their coefficients from the input."""
    return next(_find_generators(model), None) is not None


def _find_generators(model: nn.Module) -> Iterator[tuple[str, nn.Module, Coefficients]]:
    for name, module in iterate_placed_activations(model):
        entry = find_entry(module)
        if entry and entry.coefficients:
            yield name, module, entry.coefficients


def _measure_coefficients(
    model: nn.Module, images: Sequence[Tensor], batch: int
) -> dict[str, list[tuple[str, Tensor]]]:
    """Return name and value of the coefficients generated for some images, by site."""
    recorded: dict[str, dict[str, list[tuple[Tensor, Tensor | None]]]] = {}

    def record(site: str, found: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            recorded.setdefault(site, {}).setdefault(name, []).append(_reduce_positions(value.float()))

    device = next(model.parameters()).device
    with preserve_attributes(model):
        model.eval()
        handles = [
            module.register_forward_pre_hook(lambda m, inputs, s=site, c=coefficients: record(s, c(m, inputs[0])))
            for site, module, coefficients in _find_generators(model)
        ]
        try:
            for chunk in _batch_by_size(images, batch):
                stack = torch.stack(chunk).to(device)
                model(stack.float() / 255 if stack.dtype == torch.uint8 else stack)
        finally:
            for handle in handles:
                handle.remove()
    return {
        site: [summary for name, parts in coefficients.items() for summary in _reduce_images(name, parts)]
        for site, coefficients in recorded.items()
    }


def _reduce_positions(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return mean and standard deviation of (B, C, …) over positions, both (B, C); None for a single position."""
    flat = value.flatten(2) if value.ndim > 2 else value[..., None]
    return flat.mean(-1), flat.std(-1, correction=0) if flat.shape[-1] > 1 else None


def _reduce_images(name: str, parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[str, Tensor]]:
    """Return name and value of the mean of a coefficient and of its spread, over all batches.

    Args:
        name: Name of the coefficient.
        parts: Of each batch, what `_reduce_positions` returns.
    """
    means = torch.cat([mean for mean, _ in parts])
    within = [deviation for _, deviation in parts if deviation is not None]
    spread = torch.cat(within).mean() if within else means.std(0, correction=0).mean()
    return [(name, means.mean()), (name + SPREAD, spread)]


def _batch_by_size(images: Sequence[Tensor], batch: int) -> Iterator[list[Tensor]]:
    """Yield batches of consecutive images of equal shape; YOLO validates on rectangles."""
    for _, group in groupby(images, key=lambda image: image.shape):
        same = list(group)
        yield from (same[start : start + batch] for start in range(0, len(same), batch))
