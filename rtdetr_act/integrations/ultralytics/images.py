"""Images and labelled batches of Ultralytics' data sets, to run a model on."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from ultralytics import RTDETR
from ultralytics.data.augment import LetterBox, classify_transforms
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.patches import imread

from rtdetr_act.errors import InputError, quote
from rtdetr_act.integrations.ultralytics.arguments import check_positive_integers
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.results import read_scores

# Attributes in which Ultralytics keeps loaded images: their indices, pixels, and sizes before and after resizing.
_BUFFERS = ("buffer", "ims", "im_hw0", "im_hw")


def pick_images(dataset: Any, count: int = 16) -> list[Tensor]:
    """Return evenly spaced images of an Ultralytics data set, the same in every call; a training is not affected.

    The random states are restored, since Ultralytics draws a random number per image even without augmentation. So are
    the buffers of images for mosaics: an image is added to the list of indices only when it is loaded, so that one that
    is loaded but not in the list would leave the first mosaic without images.

    Args:
        dataset: Data set of one of Ultralytics' data loaders, with or without augmentation.
        count: Number of images; fewer where the data set has fewer.

    Returns:
        Images (C, H, W), uint8 or, for classification, float.
    """
    python, numpy = random.getstate(), np.random.get_state()
    lists = [
        value
        for part in getattr(dataset, "datasets", [dataset])  # those of a ConcatDataset
        for name in _BUFFERS
        if isinstance(value := getattr(part, name, None), list)
    ]
    copies = [value.copy() for value in lists]
    try:
        with torch.random.fork_rng(devices=[]):
            # Augmentation draws the same random numbers in every process.
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            chosen = sorted({index * len(dataset) // count for index in range(count)})
            return [dataset[index]["img"] for index in chosen]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for value, before in zip(lists, copies, strict=True):
            value[:] = before


def training_imgsz(model: Any, default: int) -> int:
    """Return the image size that a checkpoint was trained with, the larger one of height and width, in pixels.

    Args:
        model: RTDETR or YOLO object, loaded from the checkpoint.
        default: Size to return where the checkpoint does not tell.
    """
    imgsz = model.overrides.get("imgsz") or default
    return int(max(imgsz) if isinstance(imgsz, (list, tuple)) else imgsz)


def load_image(model: Any, path: str | Path, imgsz: int) -> Tensor:
    """Return an image as Ultralytics' predictors give it to a model: a float batch of one, (1, 3, H, W), in [0, 1].

    RT-DETR gets a square that the image is stretched to, as in training and validation; YOLO the image with its longer
    side scaled to `imgsz`, padded with grey to multiples of the stride; a classifier the square in its middle.

    Args:
        model: RTDETR or YOLO object.
        path: The image file.
        imgsz: Side of the image, in pixels; rounded up to a multiple of the model's stride.

    Raises:
        InputError: There is no such file, it is not an image, or the model does not take images of three channels.
    """
    check_positive_integers(imgsz=imgsz)
    if not Path(path).is_file():
        raise InputError(f"there is no image {quote(str(path))}")
    channels = int(model.model.yaml.get("channels", 3))
    if channels != 3:
        raise InputError(f"the model takes images of {channels} channels, and {quote(str(path))} is read as RGB")
    pixels = _read_pixels(Path(path))
    side = _round_up(model, imgsz)
    if model.task == "classify":
        return torch.stack([classify_transforms(side)(Image.fromarray(pixels))])
    stretch = isinstance(model, RTDETR)
    # By position: older releases call scale_fill scaleFill.
    scaled = LetterBox((side, side), not stretch, stretch, stride=_get_stride(model))(image=pixels)
    return torch.from_numpy(np.ascontiguousarray(scaled)).permute(2, 0, 1)[None].float() / 255


def _read_pixels(path: Path) -> np.ndarray[Any, Any]:
    """Return an image file as Ultralytics reads it, RGB of shape (H, W, 3)."""
    try:
        pixels = imread(str(path), cv2.IMREAD_COLOR)
    except (cv2.error, OSError):  # older releases: an empty file, or one that may not be read
        pixels = None
    if pixels is None:
        raise InputError(f"{quote(str(path))} is not an image that can be read: give a JPEG or a PNG, say")
    return np.ascontiguousarray(pixels[..., ::-1])


def _get_stride(model: Any) -> int:
    """Return the largest stride of a model, 32 at least."""
    return max(int(max(getattr(model.model, "stride", [32]))), 32)


def _round_up(model: Any, imgsz: int) -> int:
    """Return the side of an image, rounded up to a multiple of the stride of a model."""
    return int(check_imgsz(imgsz, _get_stride(model)))


def open_validation(
    model: Any, data: Mapping[str, Any], imgsz: int, batch: int = 1, device: str = "cpu"
) -> tuple[Any, Any]:
    """Return Ultralytics' validator for a model, and the data set that it validates on, labelled and not augmented.

    Args:
        model: RTDETR or YOLO object.
        data: The data set as `check_data` returns it.
        imgsz: Side of the images, in pixels; rounded up to a multiple of the model's stride.
        batch: Images of a batch.
        device: Device that the validator's `preprocess` moves batches to.

    Raises:
        InputError: Ultralytics cannot use the data or an argument.
    """
    side = _round_up(model, imgsz)
    arguments = {"task": model.task, "mode": "val", "imgsz": side, "batch": batch, "workers": 0}
    # A validator makes a folder for its results on construction; this one writes none.
    with translate_errors(), tempfile.TemporaryDirectory() as folder:
        validator = model.task_map[model.task]["validator"](save_dir=Path(folder), args=arguments)
        validator.data, validator.stride, validator.device = data, _get_stride(model), torch.device(device)
        validator.names = data["names"]
        return validator, validator.get_dataloader(data.get("val") or data.get("test"), batch).dataset


def load_batches(
    model: Any,
    data: Mapping[str, Any],
    images: int,
    imgsz: int,
    batch: int,
    device: str = "cpu",
    part: slice = slice(None),
) -> list[dict[str, Any]]:
    """Return labelled batches of the validation split, as Ultralytics' validators take them, without augmentation.

    Args:
        model: RTDETR or YOLO object.
        data: The data set as `check_data` returns it.
        images: Number of evenly spaced images; fewer where the split has fewer.
        imgsz: Side of the images, in pixels; rounded up to a multiple of the model's stride.
        batch: Images of a batch; the last batch may be smaller.
        device: Device of the batches.
        part: Which of these images to take, such as every second one. Default: all of them.

    Returns:
        Batches with the images under "img", float (B, 3, H, W) in [0, 1], and labels as the task's loss takes them.

    Raises:
        InputError: Ultralytics cannot use the data or an argument.
    """
    check_positive_integers(images=images, imgsz=imgsz, batch=batch)
    validator, loader = _open_images(model, data, images, imgsz, batch, device, part)
    return [validator.preprocess(each) for each in loader]


def score_images(
    model: Any,
    source: str,
    images: int,
    imgsz: int,
    batch: int,
    device: str = "cpu",
    part: slice = slice(None),
) -> dict[str, float]:
    """Return the scores of a model on the images that `load_batches` takes, as Ultralytics validates it.

    Unlike in Ultralytics' `val`, all images are squares, as in the batches.

    Args:
        model: RTDETR or YOLO object; a copy of it is validated.
        source: Ultralytics' `data` argument, as `resolve_data` returns it.
        images: As in `load_batches`.
        imgsz: As in `load_batches`.
        batch: As in `load_batches`.
        device: As in `load_batches`.
        part: As in `load_batches`.

    Returns:
        The scores, as `read_scores` returns them.
    """
    data = check_data(source, str(model.task))
    validator, loader = _open_images(model, data, images, imgsz, batch, device, part)
    cls: Any = type(validator)
    with translate_errors(), tempfile.TemporaryDirectory() as folder:
        found = copy.deepcopy(model).val(  # which fuses the model
            validator=lambda **settings: cls(loader, **settings),
            data=source,
            imgsz=imgsz,
            batch=batch,
            device=device,
            plots=False,
            verbose=False,
            project=folder,
        )
    return read_scores(found)


def _open_images(
    model: Any, data: Mapping[str, Any], images: int, imgsz: int, batch: int, device: str, part: slice
) -> tuple[Any, Any]:
    """Return a validator for a model, and a loader of a part of evenly spaced images, as in `load_batches`."""
    validator, dataset = open_validation(model, data, imgsz, batch, device)
    count = min(images, len(dataset))
    chosen = Subset(dataset, [index * len(dataset) // count for index in range(count)][part])
    return validator, DataLoader(chosen, batch_size=batch, collate_fn=getattr(dataset, "collate_fn", None))
