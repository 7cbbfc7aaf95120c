"""Ranges of Ultralytics' arguments; Ultralytics itself checks some of them, and only in its newer releases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rtdetr_act.errors import InputError, quote, suggest

_LARGEST = 1_000_000  # of a count that Ultralytics does not limit
# Smallest and largest value of each integer argument.
_INTEGERS = {
    "epochs": (1, _LARGEST),
    "patience": (0, _LARGEST),
    "save_period": (-1, _LARGEST),
    "workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "close_mosaic": (0, _LARGEST),
    "nbs": (1, _LARGEST),
    "max_det": (1, _LARGEST),
    "mask_ratio": (1, 64),
    "vid_stride": (1, _LARGEST),
    "line_width": (1, 1000),
    "opset": (9, 30),  # opsets that torch.onnx has exported since torch 1.13
}
_IMGSZ = (1, 65_536)  # pixels
# Numbers that must not be negative. All others may be any finite number.
_NON_NEGATIVE = frozenset(
    "lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr box cls dfl pose kobj rle angle dis "
    "workspace".split()
)
_OPTIMIZERS = ("auto", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "SGD", "MuSGD")
_LONGEST_NAME = 200  # bytes: most file systems allow 255, and Ultralytics appends a number to a name that is taken


def check_ranges(arguments: Mapping[str, Any]) -> None:
    """Check the ranges of Ultralytics arguments.

    Args:
        arguments: Values by key, of the types that Ultralytics expects; None is the default of any argument.

    Raises:
        InputError: A value is out of range.
    """
    for key, value in arguments.items():
        if value is None:
            continue
        if key == "imgsz":
            sides = value if isinstance(value, (list, tuple)) else [value]
            if not sides or not all(_is_integer_in(side, *_IMGSZ) for side in sides):
                raise InputError(f"imgsz must be a size in pixels such as 640, or [height, width], not {quote(value)}")
        elif key == "batch":
            fraction = isinstance(value, float) and 0 < value < 1
            if value != -1 and not fraction and not _is_integer_in(value, 1, _LARGEST):
                raise InputError(
                    "batch must be a number of images such as 16, a fraction of GPU memory such as 0.7, or -1 to fill "
                    f"60 % of it, not {quote(value)}"
                )
        elif key in _INTEGERS:
            low, high = _INTEGERS[key]
            if not _is_integer_in(value, low, high):
                raise InputError(f"{key} must be an integer from {low} to {high:,}, not {quote(value)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a finite number, not {quote(value)}")
        elif key in _NON_NEGATIVE and isinstance(value, (int, float)) and value < 0:
            raise InputError(f"{key} must not be negative, but is {quote(value)}")
        elif key == "optimizer" and str(value).lower() not in map(str.lower, _OPTIMIZERS):
            raise InputError(f"there is no optimizer {quote(value)}{suggest(value, _OPTIMIZERS)}")
        elif key == "name" and len(str(value).encode(errors="replace")) > _LONGEST_NAME:
            raise InputError(f"name must have at most {_LONGEST_NAME} characters, not {len(str(value))}")


def _is_integer_in(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
