"""Boxes that a detector found, and those that it should have found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class GroundTruth:
    """Labelled boxes of some images.

    Attributes:
        image_ids: Identifier of each image, as the files name it. The arrays refer to its position here.
        categories: Name of each category, by position too.
        images: Image of each box, (N,).
        labels: Category of each box, (N,).
        boxes: Left, top, width and height in pixels, (N, 4).
        areas: Area in pixels, by which boxes are small, medium or large, (N,): of the mask where there is one.
        crowds: Whether the box holds a crowd, which any number of detections may match, and none needs to, (N,).
    """

    image_ids: tuple[Any, ...]
    categories: tuple[str, ...]
    images: Integers
    labels: Integers
    boxes: Floats
    areas: Floats
    crowds: Booleans


@dataclass(frozen=True)
class Detections:
    """Boxes that a detector found in the images of a ground truth.

    Attributes:
        images: Image of each box, as a position in `GroundTruth.image_ids`, (N,).
        labels: Category of each box, as a position in `GroundTruth.categories`, (N,).
        boxes: Left, top, width and height in pixels, (N, 4).
        scores: Confidence, (N,).
    """

    images: Integers
    labels: Integers
    boxes: Floats
    scores: Floats
