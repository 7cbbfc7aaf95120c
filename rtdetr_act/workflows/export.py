"""Export a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rtdetr_act.deploy.operators import list_operator_warnings, list_operators
from rtdetr_act.deploy.targets import list_target_warnings
from rtdetr_act.integrations.ultralytics.datasets import resolve_data
from rtdetr_act.integrations.ultralytics.export import export_model
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.models import load_checkpoint


def export_checkpoint(
    weights: str | Path,
    export_format: str = "onnx",
    data: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    int8: bool = False,
    fold: bool = True,
    target: str | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Path:
    """Export a checkpoint through Ultralytics, its activations folded into the weights.

    Args:
        weights: A .pt checkpoint, which stays as it is.
        export_format: Ultralytics' name of the format, such as "onnx" (default), "openvino", "torchscript" or "ncnn".
        data: Data set to calibrate INT8 on; None (default) for the one that the checkpoint was trained on.
        arguments: Ultralytics' export arguments, such as {"imgsz": 640, "dynamic": True}.
        int8: Quantize weights and activations to 8 bits.
        fold: Fold the activations first.
        target: Deployment target, such as "hailo": `warn` is called for activations that it does not run natively, and
            after an export to ONNX for operators of which that holds, or is not known.
        warn: Called with each warning, one sentence.

    Returns:
        The file or folder written, beside the checkpoint.

    Raises:
        InputError: The checkpoint or the data set does not exist, or the model cannot be exported to the format.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
        Interrupted: The user pressed Ctrl-C.
    """
    model = load_checkpoint(weights)
    settings = dict(arguments or {})
    if data is not None:
        settings["data"] = resolve_data(data)
    if target is not None:
        for sentence in list_target_warnings(model, target):
            warn(sentence)
    with translate_errors(**settings):
        path = export_model(model, export_format, int8=int8, fold=fold, **settings)
    if target is not None and path.suffix == ".onnx":
        for sentence in list_operator_warnings(list_operators(path, target), target):
            warn(sentence)
    return path
