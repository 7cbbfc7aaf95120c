"""Fit a swapped network to the network before the swap (`init="match"`), on images of a data set of Ultralytics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.surgery.calibrate import calibrate, has_batch_norms
from rtdetr_act.surgery.reference import build_reference, finish_fit
from rtdetr_act.surgery.refit import refit

IMAGES = 128  # for a fit, and for BatchNorm statistics
_BATCH = 16


class ImageBatches(Sequence[Tensor]):
    """Images of a data set in batches, (B, C, H, W) in 0..1; they are kept as bytes until a batch is read.

    Args:
        images: Images (C, H, W), uint8 or float, which may have different shapes.
        size: Images of a batch, which all have one shape.
    """

    def __init__(self, images: Sequence[Tensor], size: int = _BATCH) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}  # with rect=True each batch of a data set has its own
        for image in images:
            by_shape.setdefault(image.shape, []).append(image)
        self.images = len(images)
        groups = sorted(by_shape.values(), key=len, reverse=True)
        self._batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = torch.stack(self._batches[index])
        return batch.float() / 255 if batch.dtype == torch.uint8 else batch

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def pick_batches(dataset: Any, count: int = IMAGES) -> ImageBatches:
    """Return evenly spaced images of one of Ultralytics' data sets, in batches; fewer where it has fewer."""
    return ImageBatches(pick_images(dataset, count))


def fit_to_reference(model: nn.Module, dataset: Any, count: int = IMAGES) -> None:
    """Fit a swapped network to the network before its last swap, in place, and log what was done.

    Where it is not known what the activations had learned that were replaced, only the statistics of BatchNorm are
    estimated anew, with a warning.

    Args:
        model: The swapped task model.
        dataset: Training images, as a data set of one of Ultralytics' data loaders.
        count: Number of images.
    """
    batches = pick_batches(dataset, count)
    original = build_reference(model)
    if original is not None:
        layers = refit(model, batches, original)
        log(f"{layers} layers fitted to what they gave before the swap, on {batches.images} training images")
        return
    if has_batch_norms(model):
        calibrate(model, batches)
    finish_fit(model)
    log(
        "layers not fitted, since it is not known what the activations before the swap had learned: only the "
        "statistics of BatchNorm are estimated anew",
        warn=True,
    )
