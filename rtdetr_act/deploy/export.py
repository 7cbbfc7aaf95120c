"""Export a model through Ultralytics, folded, and refuse beforehand what cannot be exported."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtdetr_act.deploy.exportable import write_out
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import InputError, RtdetrActError, suggest
from rtdetr_act.ultralytics_hooks import log, unfolded
from rtdetr_act.warmstart.blend import Blend

_ALIASES = {"tensorrt": "engine", "trt": "engine", "mlpackage": "coreml", "mlmodel": "coreml", "vitis": "xilinx"}
# Modules that an export imports, and the packages that bring them. Ultralytics would install what is missing while it
# runs, into whatever environment that is.
_ONNX = {"onnx": "onnx", "onnxslim": "onnxslim"}
_TENSORFLOW = {"tensorflow": "tensorflow", "onnx2tf": "onnx2tf"}
_TOOLS = {
    "onnx": _ONNX,
    "openvino": {"openvino": "openvino"},
    "engine": {**_ONNX, "tensorrt": "tensorrt"},
    "coreml": {"coremltools": "coremltools"},
    "saved_model": _TENSORFLOW,
    "pb": _TENSORFLOW,
    "tflite": _TENSORFLOW,
    "edgetpu": _TENSORFLOW,
    "tfjs": {**_TENSORFLOW, "tensorflowjs": "tensorflowjs"},
    "litert": {"litert_torch": "litert-torch", "ai_edge_litert": "ai-edge-litert"},
    "paddle": {"paddle": "paddlepaddle", "x2paddle": "x2paddle"},
    "mnn": {**_ONNX, "MNN": "MNN"},
    "ncnn": {"ncnn": "ncnn", "pnnx": "pnnx"},
    "rknn": {**_ONNX, "rknn": "rknn-toolkit2"},
    "executorch": {"executorch": "executorch"},
}
_INT8_TOOLS = {"onnx": {"onnxruntime": "onnxruntime"}, "openvino": {"nncf": "nncf"}}
# Ultralytics without a list of its own.
_INT8_BEFORE = ("openvino", "engine", "coreml", "saved_model", "tflite", "edgetpu", "tfjs")


def export_model(model: Any, form: str = "onnx", *, int8: bool = False, fold: bool = True, **arguments: Any) -> Path:
    """Export a model through Ultralytics, its activations folded; the model itself stays as it is.

    Args:
        model: RTDETR or YOLO, with a checkpoint's or any weights.
        form: Ultralytics' name of the format, such as "onnx", "openvino", "ncnn", "engine".
        int8: Quantise weights and activations to 8 bits, calibrated on `data`, else on what the model was trained on.
        fold: Fold activations first.
        **arguments: Ultralytics' arguments of `export`, such as imgsz, dynamic, data and split.

    Returns:
        The file or folder written.

    Raises:
        InputError: This cannot be exported, or not here: unknown format, missing tool, or no calibration data.
    """
    form = check_export(model, form, int8=int8)
    if int8:
        arguments["data"] = arguments.get("data") or _training_data(model)
        arguments.update(_int8_argument())
    if fold:
        return Path(model.export(format=form, **arguments))
    with unfolded():
        return Path(model.export(format=form, **arguments))


def prepare(model: nn.Module, *, fold: bool = True) -> nn.Module:
    """Return a copy of a model as it should be exported: activations folded, and in operators that exporters know."""
    copy = deepcopy(model)
    if blends := [module for module in copy.modules() if isinstance(module, Blend)]:
        log(
            f"{len(blends)} activations are still blended with what they replace (t = {float(blends[0].t):.2f}): "
            "export a checkpoint from after the blend for those that were asked for",
            warn=True,
        )
    if fold:
        try:
            if report := fold_activations(copy):
                log(f"{len(report)} activations folded into the weights, {len(report.kept)} kept")
        except RtdetrActError as error:
            log(f"exporting the activations unfolded: {error}", warn=True)
    write_out(copy)
    return copy


def check_export(model: Any, form: str, *, int8: bool = False) -> str:
    """Return Ultralytics' name of a format, if a model can be exported to it here.

    Raises:
        InputError: The format is unknown, its tools are missing, or it cannot hold the model.
    """
    from ultralytics import __version__
    from ultralytics.engine import exporter

    known = list(exporter.export_formats()["Argument"])[1:]
    form = _ALIASES.get(form.lower(), form.lower())
    if form == "tflite" and form not in known and "litert" in known:
        form = "litert"  # its name since 8.4.83
    if form not in known:
        raise InputError(f"there is no export format '{form}' in Ultralytics {__version__}{suggest(form, known)}")
    missing = [
        package
        for module, package in {**_TOOLS.get(form, {}), **(_INT8_TOOLS.get(form, {}) if int8 else {})}.items()
        if find_spec(module) is None
    ]
    if missing:
        raise InputError(f"format={form} needs what is not installed here: pip install {' '.join(missing)}")
    if form == "engine" and not torch.cuda.is_available():
        raise InputError("format=engine builds for the GPU it runs on, and there is none here")
    if form == "ncnn" and type(model.model.model[-1]).__name__ == "RTDETRDecoder":
        raise InputError(
            "NCNN cannot hold RT-DETR's decoder, whose operators work across the batch: use onnx or openvino"
        )
    if int8 and form not in getattr(exporter, "INT8_FORMATS", _INT8_BEFORE):
        raise InputError(
            f"Ultralytics {__version__} has no INT8 export to {form}: use openvino, or a newer Ultralytics"
        )
    return form


def _int8_argument() -> dict[str, Any]:
    from ultralytics.cfg import DEFAULT_CFG_DICT

    return {"quantize": 8} if "quantize" in DEFAULT_CFG_DICT else {"int8": True}


def _training_data(model: Any) -> str:
    from rtdetr_act.runs import resolve_data

    data = ((model.ckpt or {}).get("train_args") or {}).get("data")
    if not data:
        raise InputError("INT8 needs images to calibrate on: name a data set with --data")
    return resolve_data(str(data))
