"""Images of an Ultralytics data set, for looking at a network."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from ultralytics.utils.checks import check_imgsz

from rtdetr_act.integrations.ultralytics.arguments import check_counts
from rtdetr_act.integrations.ultralytics.failures import one_sentence

_AT_HAND = ("buffer", "ims", "im_hw0", "im_hw")  # where Ultralytics keeps them: numbers, images, sizes


def pick_images(dataset: Any, count: int = 16) -> list[Tensor]:
    """Return images of an Ultralytics data set, always the same, evenly spread; a training that uses it sees nothing.

    Ultralytics draws a random number for each image, for the order of its colours, even where it changes nothing. And
    it keeps images for mosaics, listed in a buffer that only those come to which it does not keep yet: one that is kept
    without being listed would leave the first mosaic without any.

    Args:
        dataset: What a loader of Ultralytics draws from, with or without augmentation.
        count: How many, at most.

    Returns:
        Images (C, H, W), bytes or, for classification, floats.
    """
    python, numpy = random.getstate(), np.random.get_state()
    lists = [
        value
        for part in getattr(dataset, "datasets", [dataset])  # of several, put together
        for name in _AT_HAND
        if isinstance(value := getattr(part, name, None), list)
    ]
    at_hand = [value.copy() for value in lists]
    try:
        with torch.random.fork_rng(devices=[]):
            # What augmentation draws is the same for every worker.
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            chosen = sorted({index * len(dataset) // count for index in range(count)})
            return [dataset[index]["img"] for index in chosen]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for value, before in zip(lists, at_hand, strict=True):
            value[:] = before


def trained_side(model: Any, otherwise: int) -> int:
    """Return the side in pixels of the images that a checkpoint was trained with, the longer one of height and width.

    Args:
        model: The Ultralytics model loaded from it.
        otherwise: The side where it does not say.
    """
    side = model.overrides.get("imgsz") or otherwise
    return int(max(side) if isinstance(side, (list, tuple)) else side)


def open_validation(
    model: Any, data: Mapping[str, Any], imgsz: int, batch: int = 1, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return Ultralytics' validator for a model, and the data set it would validate on: labelled, without augmentation.

    Args:
        model: RTDETR or YOLO object.
        data: What Ultralytics knows of the data set.
        imgsz: Side of the images, in pixels, brought to a multiple of the model's stride.
        batch: Images of a batch.
        device: Where the validator's `preprocess` takes batches.

    Raises:
        InputError: Ultralytics cannot use the data or an argument.
    """
    stride = max(int(max(getattr(model.model, "stride", [32]))), 32)
    arguments = {"task": model.task, "mode": "val", "imgsz": check_imgsz(imgsz, stride), "batch": batch, "workers": 0}
    # A validator makes a folder for its results; no result of this one goes there.
    with one_sentence(), tempfile.TemporaryDirectory() as folder:
        validator = model.task_map[model.task]["validator"](save_dir=Path(folder), args=arguments)
        validator.data, validator.stride, validator.device = data, stride, torch.device(device)
        validator.names = data["names"]
        return validator, validator.get_dataloader(data.get("val") or data.get("test"), batch).dataset


def load_batches(
    model: Any, data: Mapping[str, Any], images: int, imgsz: int, batch: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return labelled batches of a data set, as Ultralytics validates on them: without augmentation, images in 0..1.

    Args:
        model: RTDETR or YOLO object.
        data: What Ultralytics knows of the data set.
        images: Number of images, at equal distances in the validation split; fewer where it has fewer.
        imgsz: Side of the images, in pixels, brought to a multiple of the model's stride.
        batch: Images of a batch.
        device: Where the batches lie.

    Raises:
        InputError: Ultralytics cannot use the data or an argument.
    """
    check_counts(images=images, imgsz=imgsz, batch=batch)
    validator, dataset = open_validation(model, data, imgsz, batch, device)
    count = min(images, len(dataset))
    chosen = Subset(dataset, [index * len(dataset) // count for index in range(count)])
    loader = DataLoader(chosen, batch_size=batch, collate_fn=getattr(dataset, "collate_fn", None))
    return [validator.preprocess(each) for each in loader]
