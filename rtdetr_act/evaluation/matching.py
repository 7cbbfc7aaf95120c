"""Which detections are right: COCO's matching of boxes, by category, size and IoU threshold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rtdetr_act.evaluation.detections import Booleans, Detections, Floats, GroundTruth, Integers

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
# Areas in pixels, the bounds included, as in COCO.
SIZES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "S": (0.0, 32.0**2),
    "M": (32.0**2, 96.0**2),
    "L": (96.0**2, 1e10),
}
MAX_DETECTIONS = 100  # of an image and a category, those with the highest scores


@dataclass(frozen=True)
class Matches:
    """Detections of one category, and which of them count and are right at each size and IoU threshold.

    Attributes:
        images: Image of each detection, (N,), in the order of falling scores; of equal scores, in that of the images.
        right: Whether the detection matches a labelled box, (sizes, thresholds, N).
        counted: Whether the detection counts: not if it matches a box of another size or a crowd, or matches nothing
            and is of another size itself, (sizes, thresholds, N).
        positives: Number of labelled boxes of each image that should be found, (sizes, images).
    """

    images: Integers
    right: Booleans
    counted: Booleans
    positives: Integers


def match_detections(truth: GroundTruth, found: Detections) -> list[Matches]:
    """Return the matches of each category of a ground truth, in its order.

    In each image, the detections of a category, from the highest score down, take the labelled box with the highest
    IoU of those that are left, if it reaches the threshold, as COCO's evaluation does (Lin et al., ECCV 2014,
    arXiv:1405.0312).

    Args:
        truth: The labelled boxes.
        found: The detections, in any order.
    """
    truth_groups = _group(truth.labels, truth.images, np.zeros(len(truth.labels)))
    found_groups = _group(found.labels, found.images, -found.scores)
    bounds = np.array(list(SIZES.values()))
    return [
        _match_category(truth, found, truth_groups.get(label, {}), found_groups.get(label, {}), bounds)
        for label in range(len(truth.categories))
    ]


def _group(labels: Integers, images: Integers, keys: Floats) -> dict[int, dict[int, Integers]]:
    """Return the positions of boxes by category and image, in ascending order of a key."""
    order = np.lexsort((keys, images, labels))
    changes = np.flatnonzero(np.diff(labels[order]) | np.diff(images[order])) + 1
    groups: dict[int, dict[int, Integers]] = {}
    for part in np.split(order, changes) if len(order) else []:
        groups.setdefault(int(labels[part[0]]), {})[int(images[part[0]])] = part
    return groups


def _match_category(
    truth: GroundTruth,
    found: Detections,
    labelled: dict[int, Integers],
    detected: dict[int, Integers],
    bounds: Floats,
) -> Matches:
    """Return the matches of one category.

    Args:
        truth: The labelled boxes.
        found: The detections.
        labelled: Positions of the labelled boxes of this category, by image.
        detected: Positions of its detections by image, in the order of falling scores.
        bounds: Smallest and largest area of each size, (sizes, 2).
    """
    kept = {image: positions[:MAX_DETECTIONS] for image, positions in sorted(detected.items())}
    positions = np.concatenate([*kept.values(), np.empty(0, np.int64)]).astype(np.int64)
    shape = (len(bounds), len(IOU_THRESHOLDS), len(positions))
    right, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    counts = np.zeros((len(bounds), len(truth.image_ids)), np.int64)
    for image, boxes in labelled.items():
        counts[:, image] = (~_is_ignored(truth, boxes, bounds)).sum(1)
    start = 0
    for image, own in kept.items():
        if image in labelled:
            boxes = labelled[image]
            skipped = _is_ignored(truth, boxes, bounds)
            ious = _compute_ious(found.boxes[own], truth.boxes[boxes], truth.crowds[boxes])
            for index, taken in _match_image(ious, skipped, truth.crowds[boxes]):
                matched = taken >= 0
                to_ignored = np.take_along_axis(skipped, np.maximum(taken, 0), 1)
                right[:, :, start + index] = matched & ~to_ignored
                ignored[:, :, start + index] = matched & to_ignored
        start += len(own)
    areas = found.boxes[positions, 2] * found.boxes[positions, 3]
    outside = (areas < bounds[:, :1]) | (areas > bounds[:, 1:])
    counted = ~(ignored | (~right & outside[:, None]))
    order = np.argsort(-found.scores[positions], kind="stable")
    return Matches(found.images[positions][order], right[..., order], counted[..., order], counts)


def _is_ignored(truth: GroundTruth, boxes: Integers, bounds: Floats) -> Booleans:
    """Return which labelled boxes need not be found at each size, (sizes, boxes)."""
    areas = truth.areas[boxes]
    return np.asarray(truth.crowds[boxes] | (areas < bounds[:, :1]) | (areas > bounds[:, 1:]))


def _compute_ious(found: Floats, labelled: Floats, crowds: Booleans) -> Floats:
    """Return the intersections over unions of two sets of boxes, (found, labelled).

    With a crowd, the union is the detection alone.
    """
    ends = np.minimum(found[:, None, :2] + found[:, None, 2:], labelled[:, :2] + labelled[:, 2:])
    sides = np.maximum(ends - np.maximum(found[:, None, :2], labelled[:, :2]), 0)
    intersections = sides[..., 0] * sides[..., 1]
    areas = (found[:, 2] * found[:, 3])[:, None]
    unions = np.where(crowds, areas, areas + labelled[:, 2] * labelled[:, 3] - intersections)
    return np.divide(intersections, unions, out=np.zeros_like(intersections), where=intersections > 0)


def _match_image(ious: Floats, skipped: Booleans, crowds: Booleans) -> Iterator[tuple[int, Integers]]:
    """Yield each detection of an image that reaches the lowest threshold, and the box that it takes.

    Args:
        ious: Of detections, from the highest score down, with labelled boxes, (detections, boxes).
        skipped: Which boxes need not be found at each size, (sizes, boxes).
        crowds: Which boxes are crowds, (boxes,).

    Yields:
        Index of the detection, and index of its box, -1 for none, (sizes, thresholds).
    """
    sizes, boxes = skipped.shape
    free = np.ones((sizes, len(IOU_THRESHOLDS), boxes), bool)
    rows, columns = np.indices(free.shape[:2])
    # A box that should be found comes before one that need not be, and of equal ones the last wins, as in COCO.
    preference = np.where(skipped, 0.0, 2.0)[:, None]
    for index in np.flatnonzero(ious.max(1) >= IOU_THRESHOLDS[0]):
        own = ious[index]
        possible = free & (own >= IOU_THRESHOLDS[:, None])
        values = np.where(possible, own + preference, -1.0)[..., ::-1]
        best = boxes - 1 - values.argmax(-1)
        taken = np.where(possible.any(-1), best, -1)
        yield int(index), taken
        free[rows, columns, best] &= (taken < 0) | crowds[best]
