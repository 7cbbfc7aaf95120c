"""The ranges of Ultralytics' arguments, which it checks in part, and in its newer releases only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rtdetr_act.errors import InputError, quote, suggest

if TYPE_CHECKING:
    from torch import nn

_MANY = 1_000_000
# Least and greatest value of whole numbers.
_WHOLE = {
    "epochs": (1, _MANY),
    "patience": (0, _MANY),
    "save_period": (-1, _MANY),
    "workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "close_mosaic": (0, _MANY),
    "nbs": (1, _MANY),
    "max_det": (1, _MANY),
    "mask_ratio": (1, 64),
    "vid_stride": (1, _MANY),
    "line_width": (1, 1000),
    "opset": (9, 30),  # what torch.onnx has written since 1.13
}
_SIDE = (1, 65_536)  # pixels
# Numbers that may not be negative; all others may be any finite one.
_NOT_NEGATIVE = frozenset(
    "lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr box cls dfl pose kobj rle angle dis "
    "workspace".split()
)
_OPTIMIZERS = ("auto", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "SGD", "MuSGD")
_LONGEST_NAME = 200  # of a folder: most file systems take 255 bytes, and something is put behind it


def check_ranges(arguments: Mapping[str, Any]) -> None:
    """Check the values of Ultralytics arguments whose types are right.

    Raises:
        InputError: A value is out of range.
    """
    for key, value in arguments.items():
        if value is None:
            continue
        if key == "imgsz":
            sides = value if isinstance(value, (list, tuple)) else [value]
            if not sides or not all(_is_whole(side, *_SIDE) for side in sides):
                raise InputError(f"imgsz is a side in pixels such as 640, or [height, width], not {quote(value)}")
        elif key == "batch":
            share = isinstance(value, float) and 0 < value < 1
            if value != -1 and not share and not _is_whole(value, 1, _MANY):
                raise InputError(
                    f"batch is a number of images such as 16, a share of GPU memory such as 0.7, or -1 for a choice by "
                    f"memory, not {quote(value)}"
                )
        elif key in _WHOLE:
            low, high = _WHOLE[key]
            if not _is_whole(value, low, high):
                raise InputError(f"{key} is a whole number from {low} to {high:,}, not {quote(value)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} is a finite number, not {quote(value)}")
        elif key in _NOT_NEGATIVE and isinstance(value, (int, float)) and value < 0:
            raise InputError(f"{key} is a number from 0, not {quote(value)}")
        elif key == "optimizer" and str(value).lower() not in map(str.lower, _OPTIMIZERS):
            raise InputError(f"there is no optimizer {quote(value)}{suggest(value, _OPTIMIZERS)}")
        elif key == "name" and len(str(value).encode(errors="replace")) > _LONGEST_NAME:
            raise InputError(f"name is at most {_LONGEST_NAME} characters long, not {len(str(value))}")


def move_to(module: nn.Module, device: Any) -> nn.Module:
    """Return a module on the one device that a command works on.

    Raises:
        InputError: There is no such device here, or it is none, such as a list of several.
    """
    if not isinstance(device, (str, int)) or isinstance(device, bool):
        raise InputError(f"device is one, such as cpu or cuda:1, not {quote(device)}")
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"device {quote(str(device))} cannot be used: {why}") from None


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
