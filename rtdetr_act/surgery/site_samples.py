"""Sample what the activations of a network get and return for real images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtdetr_act.surgery.modules import evaluation_mode
from rtdetr_act.surgery.sites import Site, find_sites, observe_activations

_MAX_VALUES = 1 << 16  # of a site: 77 sites of yolo11n are fitted to as many in 4 s


@dataclass(frozen=True)
class SiteSample:
    """Inputs and outputs of an activation, for some images and a window of positions.

    Attributes:
        inputs: Of the shape that the activation was called with, but for the positions.
        outputs: What it returned, of the same shape.
    """

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def sample_sites(root: nn.Module, names: Collection[str], images: Tensor) -> dict[str, SiteSample]:
    """Run a model once and return a sample of what its activations get and return, by name of the site.

    Args:
        root: The model, which runs in evaluation mode.
        names: Names of the sites; those that are not run are left out.
        images: Inputs to run it on, (B, C, H, W).
    """
    samples: dict[str, SiteSample] = {}

    def observe(site: Site) -> Callable[..., Tensor]:
        def call(activation: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object) -> Tensor:
            inputs = _crop(x, site.layout).clone()  # since it may work in place
            y = activation(x, *args, **kwargs)
            if y.shape == x.shape and site.name not in samples:
                samples[site.name] = SiteSample(inputs, _crop(y, site.layout).clone())
            return y

        return call

    sites = [site for site in find_sites(root, images) if site.name in names]
    with observe_activations(sites, observe), evaluation_mode(root):
        root(images)
    return samples


def _crop(x: Tensor, layout: str) -> Tensor:
    """Return a window in the middle of a map or a sequence, with about `_MAX_VALUES` values at most."""
    dims = range(1, x.dim() - 1) if layout == "tokens" else range(2, x.dim())
    if not len(dims) or x.numel() <= _MAX_VALUES:
        return x
    ratio = (_MAX_VALUES / x.numel()) ** (1 / len(dims))
    for dim in dims:
        size = max(int(x.shape[dim] * ratio), 1)
        x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
    return x
