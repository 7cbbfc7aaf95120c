"""Re-estimate BatchNorm statistics after a swap, without training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.model_plan import mark_fitted
from rtdetr_act.surgery.modules import evaluating, unwrap


def calibrate(model: Any, images: Tensor | Iterable[Tensor]) -> int:
    """Set the statistics of every BatchNorm to those of the given images, in place; weights stay as they are.

    After a swap, the layers behind an activation see other means and variances than the ones they were trained with.
    Each batch counts the same. A few hundred images, in batches of 16 or more, prepared as in training. Ultralytics'
    training after it does not `refit`, which would take the new statistics for those of the old network.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images.
        images: One batch or several, each (B, C, H, W), for an Ultralytics model RGB in 0..1. They are moved to the
            model's device and type.

    Returns:
        The number of BatchNorm layers.

    Raises:
        InputError: There are no images, or the model has no BatchNorm (it may be fused).
        ModelError: The model is exported, wrapped or compiled.

    >>> net = nn.Sequential(nn.BatchNorm2d(1))
    >>> calibrate(net, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)), net[0].running_mean
    (1, tensor([2.]))
    """
    root = unwrap(model)
    if not has_norms(root):
        raise InputError("the model has no BatchNorm to calibrate: calibrate it before it is fused")
    count = estimate_statistics(root, [images] if isinstance(images, Tensor) else images)
    mark_fitted(root)
    return count


@torch.no_grad()
def estimate_statistics(root: nn.Module, batches: Iterable[Tensor]) -> int:
    """Run a model on batches, each BatchNorm with the statistics of the batch, which it keeps; return how many."""
    norms = list(_norms(root))
    before = [(norm, norm.momentum) for norm in norms]
    seen = 0
    try:
        with evaluating(root):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
            for batch in batches:
                root(bring_to(root, batch))
                seen += 1
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
    if not seen:
        raise InputError("calibrate got no images: give at least one batch")
    return len(norms)


def bring_to(root: nn.Module, batch: Tensor) -> Tensor:
    """Return a batch on a model's device and in its type."""
    reference = next(parameter for parameter in root.parameters() if parameter.is_floating_point())
    return batch.to(reference.device, reference.dtype)


def has_norms(model: nn.Module) -> bool:
    """Return whether a model has statistics to calibrate."""
    return next(_norms(model), None) is not None


def _norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield module
