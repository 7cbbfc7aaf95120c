"""Re-estimate BatchNorm statistics after a swap, without training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.modules import evaluation_mode, unwrap
from rtdetr_act.surgery.reference import finish_fit


def calibrate(model: Any, images: Tensor | Iterable[Tensor]) -> int:
    """Re-estimate the running statistics of every BatchNorm on images, in place, without changing weights.

    After a swap, the layers that follow an activation get inputs with other means and variances than in training. Use a
    few hundred images, preprocessed as in training, in batches of 16 or more; all batches have the same weight. A
    later training with Ultralytics does not run `refit`, which would take the new statistics for those of the original
    network.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images.
        images: One batch or several, each (B, C, H, W); for Ultralytics models RGB in 0..1. They are moved to the
            device and dtype of the model.

    Returns:
        The number of BatchNorm layers.

    Raises:
        InputError: There are no images, or the model has no BatchNorm, as after fusing.
        ModelError: The model is exported, wrapped or compiled.

    >>> net = nn.Sequential(nn.BatchNorm2d(1))
    >>> calibrate(net, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)), net[0].running_mean
    (1, tensor([2.]))
    """
    root = unwrap(model)
    if not has_batch_norms(root):
        raise InputError("the model has no BatchNorm to calibrate: calibrate it before it is fused")
    count = estimate_statistics(root, [images] if isinstance(images, Tensor) else images)
    finish_fit(root)
    return count


@torch.no_grad()
def estimate_statistics(root: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the running statistics of every BatchNorm to their mean over batches, in place.

    Args:
        root: The model, which otherwise runs in evaluation mode.
        batches: One or more, each (B, C, H, W).

    Returns:
        The number of BatchNorm layers.

    Raises:
        InputError: There is no batch.
    """
    norms = list(_find_batch_norms(root))
    before = [(norm, norm.momentum) for norm in norms]
    seen = 0
    try:
        with evaluation_mode(root):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average over all batches
            for batch in batches:
                root(move_to_model(root, batch))
                seen += 1
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
    if not seen:
        raise InputError("calibrate got no images: give at least one batch")
    return len(norms)


def move_to_model(root: nn.Module, batch: Tensor) -> Tensor:
    """Return a batch on the device and in the dtype of a model's parameters."""
    reference = next(parameter for parameter in root.parameters() if parameter.is_floating_point())
    return batch.to(reference.device, reference.dtype)


def has_batch_norms(model: nn.Module) -> bool:
    """Return whether a model has a BatchNorm with running statistics."""
    return next(_find_batch_norms(model), None) is not None


def _find_batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield module
