"""Images of an Ultralytics data set, for looking at a network."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pick_images(dataset: Any, count: int = 16) -> list[Tensor]:
    """Return images of an Ultralytics data set, always the same, evenly spread; a training that uses it sees nothing.

    Ultralytics draws a random number for each image, for the order of its colours, even where it changes nothing, and
    remembers which images it has at hand for mosaics.

    Args:
        dataset: What a loader of Ultralytics draws from, with or without augmentation.
        count: How many, at most.

    Returns:
        Images (C, H, W), bytes or, for classification, floats.
    """
    python, numpy, buffer = random.getstate(), np.random.get_state(), list(getattr(dataset, "buffer", ()))
    try:
        with torch.random.fork_rng(devices=[]):
            chosen = sorted({index * len(dataset) // count for index in range(count)})
            return [dataset[index]["img"] for index in chosen]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if buffer or getattr(dataset, "buffer", None):
            dataset.buffer[:] = buffer
