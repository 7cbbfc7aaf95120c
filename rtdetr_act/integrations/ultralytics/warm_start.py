"""Fit a swapped network to the network before the swap (`init="match"`), on images of a data set of Ultralytics."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.surgery.calibrate import calibrate, has_batch_norms
from rtdetr_act.surgery.patcher import patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.refit import refit
from rtdetr_act.surgery.sites import iterate_placed_activations

CALIBRATION_IMAGES = 128  # images for BatchNorm statistics
_REFIT_PIXELS = 128 * 320 * 320  # pixels of the images for `refit`, which are one batch
_CALIBRATION_BATCH = 16


def build_original(model: nn.Module, plan: Plan) -> nn.Module | None:
    """Return the network before a swap; None if its activations learned, since their parameters are lost then.

    Args:
        model: The swapped task model.
        plan: Its plan.
    """
    original = copy.deepcopy(model)
    unpatch_model(original)
    if plan.reference:
        patch_model(original, plan.reference)
    learned = any([*module.parameters()] for _, module in iterate_placed_activations(original))
    return None if learned else original


def fit_to_original(model: nn.Module, original: nn.Module, dataset: Any, imgsz: int) -> str:
    """Fit the convolutions of a swapped network to what they gave before the swap, in place.

    Args:
        model: The swapped task model.
        original: As `build_original` returns it.
        dataset: Training images, as a data set of one of Ultralytics' data loaders.
        imgsz: Side of the images, in pixels.

    Returns:
        What was done, in one sentence.
    """
    images = collect_images(dataset, max(_REFIT_PIXELS // imgsz**2, 1))
    count = refit(model, images, original)
    return f"{count} convolutions fitted to what they gave before the swap, on {len(images)} training images"


def calibrate_networks(networks: list[nn.Module], dataset: Any) -> str:
    """Estimate the BatchNorm statistics of swapped networks again, in place.

    Args:
        networks: The networks, of the same architecture.
        dataset: As in `fit_to_original`.

    Returns:
        What was done, in one sentence.
    """
    if has_batch_norms(networks[0]):
        images = collect_images(dataset, CALIBRATION_IMAGES)
        for network in networks:
            calibrate(network, images.split(_CALIBRATION_BATCH))
    return "convolutions not fitted, since the activations before the swap learned: BatchNorm statistics only"


def collect_images(dataset: Any, count: int) -> Tensor:
    """Return up to `count` images of the most common shape, (B, C, H, W) in 0..1."""
    images = pick_images(dataset, min(count, CALIBRATION_IMAGES))
    [(shape, _)] = Counter(image.shape for image in images).most_common(1)  # with rect=True each batch has its own
    chosen = (image for image in images if image.shape == shape)
    return torch.stack([image.float() / 255 if image.dtype == torch.uint8 else image for image in chosen])
