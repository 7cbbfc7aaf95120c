"""What activations learned, read from a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.surgery.modules import left_as_it_was
from rtdetr_act.surgery.parameters import slopes
from rtdetr_act.surgery.sites import MARK, placed_activations

SPREAD = "_spread"  # ends the name of how far a quantity differs between images


_BATCH_SIZE = 16


_LAYER = re.compile(r"(?:^|\.)model\.(\d+)\.")


@dataclass(frozen=True)
class Quantity:
    """One number that an activation learned.

    Attributes:
        site: Qualified name of the activation, as in `model.9.m.3.cv2.act`.
        activation: What stands there, as the plan names it.
        name: Which number of it, such as "alpha".
        value: The number.
    """

    site: str
    activation: str
    name: str
    value: float

    @property
    def layer(self) -> int | None:
        """Index of the Ultralytics layer, None in other models."""
        return layer_index(self.site)


def layer_index(site: str) -> int | None:
    """Return the index of the Ultralytics layer that a site is in, None in other models.

    >>> layer_index("model.9.m.3.cv2.act"), layer_index("features.0.1")
    (9, None)
    """
    found = _LAYER.search(site)
    return int(found[1]) if found else None


def learned_parameters(model: nn.Module, images: Sequence[Tensor] = ()) -> dict[str, float]:
    """Return what `read_quantities` reads, by `site.quantity`.

    >>> from rtdetr_act import patch_model
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> _ = patch_model(model, "prelu")
    >>> learned_parameters(model)
    {'1.weight': 0.25}
    """
    return {f"{read.site}.{read.name}": read.value for read in read_quantities(model, images)}


@torch.no_grad()
def read_quantities(model: nn.Module, images: Sequence[Tensor] = (), *, batch: int = _BATCH_SIZE) -> list[Quantity]:
    """Read what the activations learned that a swap placed in a model.

    AReLU's are as it uses them, `alpha` clamped to 0.01..0.99 and `beta` the sigmoid of the stored one. A parameter
    per channel is its mean over the channels; PReLU's `weight` then has `weight_min` and `weight_max` beside it. Of the
    weights that generate slopes from the input (Dynamic ReLU, Meta-ACON) or make a condition of it (FReLU), a site has
    `weights_norm`, the L2 norm of them all.

    With images, what is generated is measured too, in one pass in evaluation mode that leaves the model as it was:
    Dynamic ReLU's `a1`, `a2`, `b1`, `b2` and Meta-ACON's `beta`, each as the mean over images and channels, and as
    `…_spread`, the standard deviation over the images, averaged over the channels. `pi` of variant C is the mean over
    positions, `pi_spread` its standard deviation over the positions of an image, averaged over the images.

    Args:
        model: A task model, or any patched module.
        images: What the model takes, (C, H, W) each: bytes, which become 0..1, or floats as they are.
        batch: Images of one size that may go through the model at once.

    Returns:
        The quantities in the order of the sites; empty for a model without learnable placed activations.
    """
    single = {id(parameter) for parameter in slopes(model)}
    measured = _measure_coefficients(model, images, batch) if images and has_coefficients(model) else {}
    return [
        Quantity(site, str(getattr(activation, MARK)["activation"]), name, value.item())
        for site, activation in placed_activations(model)
        for name, value in chain(_summarise_parameters(activation, single), measured.get(site, ()))
    ]


def _summarise_parameters(activation: nn.Module, single: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, scalar) of one activation; `single` has the ids of scalar and per-channel parameters."""
    if isinstance(activation, AReLU):
        yield "alpha", activation.slopes()[1]
        yield "beta", torch.sigmoid(activation.beta)
        return
    weights = []
    for name, parameter in activation.named_parameters():
        if id(parameter) in single:
            yield name, parameter.float().mean()
            if isinstance(activation, nn.PReLU) and parameter.numel() > 1:
                yield f"{name}_min", parameter.min()
                yield f"{name}_max", parameter.max()
        else:
            weights.append(parameter.float().norm())
    if weights:
        yield "weights_norm", torch.stack(weights).norm()


def has_coefficients(model: nn.Module) -> bool:
    """Say whether a model has activations that generate their coefficients from the input."""
    return next(_find_generators(model), None) is not None


def _find_generators(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in placed_activations(model) if hasattr(module, "named_coefficients"))


def _measure_coefficients(
    model: nn.Module, images: Sequence[Tensor], batch: int
) -> dict[str, list[tuple[str, Tensor]]]:
    """Return (name, scalar) of what the activations generate for the images, by site."""
    seen: dict[str, dict[str, list[tuple[Tensor, Tensor | None]]]] = {}

    def note(site: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        for name, value in module.named_coefficients(inputs[0]).items():
            seen.setdefault(site, {}).setdefault(name, []).append(_reduce_positions(value.float()))

    device = next(model.parameters()).device
    with left_as_it_was(model):
        model.eval()
        handles = [
            module.register_forward_pre_hook(lambda module, inputs, site=site: note(site, module, inputs))
            for site, module in _find_generators(model)
        ]
        try:
            for chunk in _batch_by_size(images, batch):
                stack = torch.stack(chunk).to(device)
                model(stack.float() / 255 if stack.dtype == torch.uint8 else stack)
        finally:
            for handle in handles:
                handle.remove()
    return {
        site: [summary for name, parts in found.items() for summary in _reduce_images(name, parts)]
        for site, found in seen.items()
    }


def _reduce_positions(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the means of (B, C, …) over positions, (B, C), and their deviations where there are positions."""
    flat = value.flatten(2) if value.ndim > 2 else value[..., None]
    return flat.mean(-1), flat.std(-1, correction=0) if flat.shape[-1] > 1 else None


def _reduce_images(name: str, parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[str, Tensor]]:
    means = torch.cat([mean for mean, _ in parts])
    within = [deviation for _, deviation in parts if deviation is not None]
    spread = torch.cat(within).mean() if within else means.std(0, correction=0).mean()
    return [(name, means.mean()), (name + SPREAD, spread)]


def _batch_by_size(images: Sequence[Tensor], batch: int) -> Iterator[list[Tensor]]:
    """Yield neighbours of one size, since YOLO validates rectangles."""
    for _, group in groupby(images, key=lambda image: image.shape):
        same = list(group)
        yield from (same[start : start + batch] for start in range(0, len(same), batch))
