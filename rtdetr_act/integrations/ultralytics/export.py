"""Export a model through Ultralytics, folded and in whole files, and refuse beforehand what cannot be exported."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine import exporter
from ultralytics.utils import LOGGER
from ultralytics.utils.files import file_size

from rtdetr_act.deploy.exportable import write_out
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import InputError, RtdetrActError, quote, reason, suggest
from rtdetr_act.files import move_files_atomically, partial_path, remove_leftovers
from rtdetr_act.integrations.ultralytics.datasets import training_data
from rtdetr_act.integrations.ultralytics.failures import is_full
from rtdetr_act.integrations.ultralytics.log import log

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

_TEXTS = (".json", ".param", ".py", ".txt", ".xml", ".yaml")

_folds: bool | None = None  # inside `exporting`: whether it folds


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
        InputError: This cannot be exported, or not here: unknown format, missing tool, no calibration data, or no room
            on the disk. What was exported before is then as it was.
    """
    form = check_export(model, form, int8=int8)
    batch = arguments.get("batch", 1)
    if not isinstance(batch, int) or batch < 1:  # a training's may be a share of the memory
        raise InputError(f"batch is a whole number of images from 1 in an exported file, not {quote(batch)}")
    if int8:
        arguments["data"] = arguments.get("data") or training_data(model)
        arguments.update(_int8_argument())
    with exporting(fold=fold):
        return Path(model.export(format=form, **arguments))


@contextmanager
def exporting(*, fold: bool = True) -> Iterator[None]:
    """Export inside the block as `export_model` does, models without a swap too: in whole files, folded or not."""
    global _folds
    _folds, before = fold, _folds
    try:
        yield
    finally:
        _folds = before


def is_our_export() -> bool:
    """Say whether this is inside of `exporting`."""
    return _folds is not None


def export_staged(original: Callable[..., Any], exporter: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call an exporter of Ultralytics on a prepared copy of a model, and give its files their names when it is through.

    It writes beside the checkpoint, over what is there; so it gets a hidden folder there for its place. A folder that
    it makes, such as `best_openvino_model`, replaces the one before wholly. Callbacks of the end come after all that.

    Args:
        original: `Exporter.__call__`.
        exporter: The exporter.
        model: The task model.
        *args: For `original`, after the model.
        **kwargs: For `original`.

    Returns:
        What `original` returns, with the final path.

    Raises:
        InputError: The files cannot be written; then all is as it was.
    """
    copy = prepare(model, fold=_folds is not False)
    file = _checkpoint_of(copy)
    if not file.name:  # a module from elsewhere: Ultralytics says that it has no name
        return original(exporter, copy, *args, **kwargs)
    target = file.with_name(f"{file.stem}-export")
    stage = partial_path(target)
    suffix = ".pt"
    while suffix in str(stage / file.stem):  # Ultralytics replaces it by "_openvino_model" wherever the path has it
        suffix += "_"
    staged = stage / f"{file.stem}{suffix}"
    copy.pt_path = str(staged)  # type: ignore[assignment]
    last = exporter.callbacks.get("on_export_end", [])
    exporter.callbacks["on_export_end"] = []
    try:
        with _writing(file, stage):
            remove_leftovers(target)
            shutil.rmtree(stage, ignore_errors=True)  # of a killed process with this one's number
            stage.mkdir()
        with _final_names(staged, file):
            result = _call(original, file, stage, exporter, copy, *args, **kwargs)
        with _writing(file, stage):
            _name_finally(stage)
            move_files_atomically({file.with_name(path.name): path for path in stage.iterdir()})
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        exporter.callbacks["on_export_end"] = last
    exporter.file = file
    exporter.run_callbacks("on_export_end")
    if not isinstance(result, (str, Path)):
        return result
    return type(result)(without_stage(str(result), stage))


def _checkpoint_of(model: Any) -> Path:
    """Return the path from which Ultralytics derives those of the exported files."""
    names = (getattr(model, "pt_path", None), getattr(model, "yaml_file", None))
    file = Path(next(filter(None, names), None) or getattr(model, "yaml", {}).get("yaml_file", ""))
    return Path(file.name) if file.suffix in (".yaml", ".yml") else file


def _call(original: Callable[..., Any], file: Path, stage: Path, *args: Any, **kwargs: Any) -> Any:
    try:
        with _interruptible(), _scripts_in_memory():
            result = original(*args, **kwargs)
    # With a full disk OpenVINO raises a RuntimeError and removes its file, Python's own writers raise an OSError, and
    # what is left of a small file fails an assert.
    except Exception as error:
        if is_full(error):
            raise _not_written(file, stage, error) from error
        if full := _try_disk(stage):
            raise _not_written(file, stage, full) from error
        if "onnx_opset_version" in str(error):  # "Unsupported onnx_opset_version: 30"
            raise InputError(f"this torch cannot write this opset of ONNX: {reason(error)}") from error
        raise
    if full := _try_disk(stage):  # a tool that does not look at what became of its writes
        raise _not_written(file, stage, full)
    return result


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be one in OpenVINO too.

    Its frontend calls Python from C++, where an exception becomes a failed conversion, or the end of the process. So
    Ctrl-C waits until it has come back from there, and whatever an exporter makes of one, it is a KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[threading.Timer | None] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_inside("openvino", frame):
            timer = threading.Timer(0.1, interrupt_main)  # and looks again
            timer.daemon = True
            timer.start()
            pressed.append(timer)
        else:
            pressed.append(None)
            before(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in pressed:
            if timer is not None:
                timer.cancel()
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _is_inside(package: str, frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _scripts_in_memory() -> Iterator[None]:
    """Let Python write traced modules: torch's writer aborts the process when the disk is full (2.4 and 2.15 do)."""
    traced: Any = torch.jit.ScriptModule
    original = traced.save

    def save(self: Any, f: str | os.PathLike[str], **kwargs: Any) -> None:
        Path(f).write_bytes(self.save_to_buffer(**kwargs))

    traced.save = save
    try:
        yield
    finally:
        traced.save = original


def _try_disk(stage: Path) -> OSError | None:
    """Return why nothing more can be written to the disk, if that is so; nor a file larger than the largest there."""
    probe = stage / ".probe"
    try:
        largest = max((path.stat().st_size for path in stage.rglob("*") if path.is_file()), default=0)
        with probe.open("wb") as file:
            file.seek(largest)
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return error
    return None


@contextmanager
def _writing(file: Path, stage: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _not_written(file, stage, error) from error


def _not_written(file: Path, stage: Path, error: Exception) -> InputError:
    found = [file.with_name(path.name) for path in stage.iterdir() if path.name != ".probe"] if stage.is_dir() else []
    what = ", ".join(quote(str(path)) for path in found) or f"the exported files to {quote(str(file.parent))}"
    why = getattr(error, "strerror", None) or reason(error)
    return InputError(f"cannot write {what}: {why}; what was exported there before is as it was")


@contextmanager
def _final_names(staged: Path, file: Path) -> Iterator[None]:
    """Let Ultralytics' logger write the names that files will have, for those that they have in the meantime."""

    def rename(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if staged.parent.name in text:
            if str(staged) in text:  # "starting from 'best.pt' with … (0.0 MB)", since it is not there
                text = text.replace(str(staged), str(file)).replace("(0.0 MB)", f"({file_size(file):.1f} MB)")
            record.msg, record.args = without_stage(text, staged.parent), None
        return True

    LOGGER.addFilter(rename)
    try:
        yield
    finally:
        LOGGER.removeFilter(rename)


def _name_finally(stage: Path) -> None:
    """Put the final paths into what names its own files, as NCNN's `model_ncnn.py` does."""
    for path in stage.rglob("*"):
        if path.suffix in _TEXTS and path.is_file():
            text = path.read_bytes().decode(errors="surrogateescape")
            if stage.name in text:
                path.write_bytes(without_stage(text, stage).encode(errors="surrogateescape"))


def without_stage(text: str, stage: Path) -> str:
    """Return a text with the paths that what lies in a hidden folder will have beside it."""
    name = re.escape(stage.name)
    return re.sub(rf"{name}[/\\]|[/\\]?{name}", "", text)


def prepare(model: nn.Module, *, fold: bool = True) -> nn.Module:
    """Return a copy of a model as it should be exported: activations folded, and in operators that exporters know."""
    copy = deepcopy(model)
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
    known = list(exporter.export_formats()["Argument"])[1:]
    form = _ALIASES.get(form.lower(), form.lower())
    if form == "tflite" and form not in known and "litert" in known:
        form = "litert"  # its name since 8.4.83
    if form not in known:
        raise InputError(f"there is no export format {quote(form)} in Ultralytics {__version__}{suggest(form, known)}")
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
    return {"quantize": 8} if "quantize" in DEFAULT_CFG_DICT else {"int8": True}
