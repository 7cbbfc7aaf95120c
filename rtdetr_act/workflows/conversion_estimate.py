"""What a conversion would do, and how long it would take, without doing it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.images import open_validation
from rtdetr_act.integrations.ultralytics.log import log_level
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.surgery.modules import evaluation_mode
from rtdetr_act.surgery.plan import Scope
from rtdetr_act.workflows.convert import check_request, choose_folder

# In units of the time that one image takes in one forward pass: both networks of the fit and its least squares, and
# forward, backward and optimizer of a training, as measured on yolo11n at 160 pixels on one core.
_FIT, _TRAINING = 5.0, 5.0
_EXPORT_SECONDS = 40.0  # of a format, with its latency


def estimate_conversion(
    source: str | Path,
    activations: str | Sequence[str],
    data: str | Path | None = None,
    *,
    keep: str | Sequence[str] = (),
    scope: Scope = "conv",
    target: str | None = None,
    bound: float = 0.01,
    epochs: int = 3,
    formats: str | Sequence[str] = "onnx",
    int8: bool = False,
    images: int = 128,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return what `convert_checkpoint` would do with the same arguments, and how long, as lines of text.

    Nothing is written. The time is extrapolated from two forward passes on this CPU.

    Raises:
        RtdetrActError: As of `convert_checkpoint`.
    """
    request = check_request(
        source, activations, data, keep=keep, scope=scope, target=target, bound=bound, epochs=epochs, formats=formats,
        int8=int8, images=images, arguments=arguments,
    )  # fmt: skip
    model = load_checkpoint(source)
    known = check_data(request.data, str(model.task))
    with log_level(logging.WARNING):
        training, validation = (
            len(open_validation(model, {**known, "val": known[split]}, request.imgsz)[1]) for split in ("train", "val")
        )
    seconds = _time_forward(model.model, request.imgsz)
    scoring = validation * seconds * 1.5
    fit = min(images, training) * seconds * _FIT
    trained = epochs * (training * seconds * _TRAINING + scoring)
    exports = len(request.formats) + sum(int8 and name in ("onnx", "openvino") for name in request.formats)
    deploy = (1 + exports) * 2 * (_EXPORT_SECONDS + scoring)
    each = scoring + (fit + scoring) + (min(images, training) * seconds * 1.5 + scoring)
    lines = [
        f"validate the checkpoint on {validation} images at {request.imgsz} pixels: {_format(scoring)}",
        *(
            f"{name}: swap, refit on {min(images, training)} images, calibrate, validate each: {_format(each)}; "
            f"{epochs} epochs more if over {bound:.1%} are lost: {_format(trained)}"
            for name in request.activations
        ),
        f"fold, export and measure {', '.join(('torch', *request.formats))}{', int8' if int8 else ''} beside the "
        f"checkpoint: {_format(deploy)}",
    ]
    least = scoring + len(request.activations) * each + deploy
    most = least + len(request.activations) * trained
    lines.append(f"in all {_format(least)} to {_format(most)} on this CPU, in {choose_folder(request, None)}")
    return "\n".join(lines)


def _time_forward(network: torch.nn.Module, imgsz: int) -> float:
    """Return the seconds that one image takes, the second time."""
    image = torch.zeros(1, 3, imgsz, imgsz)
    with evaluation_mode(network), torch.no_grad():
        for _ in range(2):
            started = time.monotonic()
            network(image)
            seconds = time.monotonic() - started
    return seconds


def _format(seconds: float) -> str:
    """Return a time in words.

    >>> _format(20), _format(150)
    ('under a minute', 'about 2.5 minutes')
    """
    return "under a minute" if seconds < 45 else f"about {seconds / 60:.1f} minutes"
