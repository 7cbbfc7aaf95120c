"""Average precision as COCO defines it, of images with weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rtdetr_act.evaluation.detections import Booleans, Floats, Integers
from rtdetr_act.evaluation.matching import Matches

_LEVELS = 101  # of recall, at which precision is taken
_MAX_CELLS = 4_000_000  # of a tensor with a row per right detection and a column per weighting: 32 MB


def compute_average_precision(matches: Sequence[Matches], weights: Floats) -> Floats:
    """Return the average precision of each category, size and IoU threshold, once for each weighting of the images.

    A weight of 2 counts an image twice, and 0 leaves it out. Detections with equal scores are ranked in the order of
    the images.

    Args:
        matches: Of one detector, as `match_detections` returns them, one or more.
        weights: Whole number of each image in each weighting, (images, B).

    Returns:
        Average precision as a fraction of 1, (categories, sizes, thresholds, B), NaN where no box is to be found.
    """
    columns = torch.from_numpy(np.ascontiguousarray(weights, np.float32))
    result = np.full((len(matches), *matches[0].right.shape[:2], columns.shape[1]), np.nan)
    for category, each in enumerate(matches):
        for size in range(len(each.right)):
            holding = np.flatnonzero(each.positives[size])
            if len(holding):
                counts = torch.from_numpy(each.positives[size, holding]).double()
                totals = counts @ columns[torch.from_numpy(holding)].double()
                result[category, size] = _compute_thresholds(
                    each.images, each.right[size], each.counted[size], columns, totals
                )
    return result


def _compute_thresholds(
    images: Integers, right: Booleans, counted: Booleans, weights: Tensor, totals: Tensor
) -> Floats:
    """Return the average precision of one category and size, (thresholds, B).

    Args:
        images: Image of each detection, (N,).
        right: Which detections are right, (thresholds, N).
        counted: Which detections count, (thresholds, N).
        weights: Weights of the images, (images, B), float32.
        totals: Number of boxes to find, (B,), float64.
    """
    most = max(int(right.sum(1).max(initial=0)), 1)
    step = max(1, _MAX_CELLS // most)
    result = np.empty((len(right), weights.shape[1]))
    for start in range(0, weights.shape[1], step):
        part = slice(start, start + step)
        own, boxes = weights[:, part].contiguous(), totals[part]
        for threshold in range(len(right)):
            kept = counted[threshold]
            result[threshold, part] = _compute_curve(images[kept], right[threshold, kept], own, boxes)
    return result


def _compute_curve(images: Integers, right: Booleans, weights: Tensor, totals: Tensor) -> Floats:
    """Return the area under the interpolated precision of one threshold, (B,); NaN where nothing is to be found."""
    positions = np.flatnonzero(right)
    if not len(positions):
        return torch.where(totals > 0, 0.0, torch.nan).numpy()
    # Only a right detection raises the recall: what lies between two of them is summed at once.
    offsets = torch.from_numpy(np.concatenate([[0], positions[:-1] + 1]))
    ranked = torch.from_numpy(images[: positions[-1] + 1])
    found = F.embedding_bag(ranked, weights, offsets, mode="sum").double().cumsum(0)
    correct = weights[torch.from_numpy(images[positions])].double().cumsum(0)
    precision = torch.where(correct > 0, correct / found, 0.0).numpy()
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    steps = np.diff(_count_levels(correct / totals).numpy(), axis=0, prepend=0.0)
    areas = np.einsum("nb,nb->b", envelope, steps) / _LEVELS
    return np.where(totals.numpy() > 0, areas, np.nan)


def _count_levels(recall: Tensor) -> Tensor:
    """Return how many of 0, 0.01, …, 1 each recall reaches, rounded as COCO's tools do: 0.57 is below 57 * 0.01."""
    hundredths = (recall * 100).floor_()
    hundredths -= (hundredths * 0.01 > recall).double()
    hundredths += ((hundredths + 1) * 0.01 <= recall).double()
    return hundredths + 1
