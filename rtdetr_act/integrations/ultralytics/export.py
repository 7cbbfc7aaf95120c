"""Export models through Ultralytics: folded, in complete files, and checked before the export starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.engine import exporter
from ultralytics.utils.files import file_size

from rtdetr_act.deploy.exportable import replace_for_export
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import InputError, RtdetrActError, quote, reason, suggest
from rtdetr_act.files import move_files_atomically, partial_path, remove_leftovers
from rtdetr_act.integrations.ultralytics.datasets import training_data
from rtdetr_act.integrations.ultralytics.failures import is_write_error
from rtdetr_act.integrations.ultralytics.int8 import float_arguments, is_int8_onnx, quantise_exported
from rtdetr_act.integrations.ultralytics.log import edited_log, log, only_warnings

_ALIASES = {"tensorrt": "engine", "trt": "engine", "mlpackage": "coreml", "mlmodel": "coreml", "vitis": "xilinx"}
# Modules that an export imports, and the packages that they are in. Ultralytics would install missing packages at run
# time, into the current environment.
_ONNX = {"onnx": "onnx", "onnxslim": "onnxslim"}
_TENSORFLOW = {"tensorflow": "tensorflow", "onnx2tf": "onnx2tf"}
_REQUIREMENTS: dict[str, dict[str, str]] = {
    "torchscript": {},
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
_INT8_REQUIREMENTS = {"onnx": {"onnxruntime": "onnxruntime"}, "openvino": {"nncf": "nncf"}}
# For releases of Ultralytics that have no such list.
_INT8_FORMATS = ("openvino", "engine", "coreml", "saved_model", "tflite", "edgetpu", "tfjs")

_TEXT_SUFFIXES = (".json", ".param", ".py", ".txt", ".xml", ".yaml")

_fold_inside: bool | None = None  # whether the innermost `exporting` block folds; None outside of any


def export_model(
    model: Any, export_format: str = "onnx", *, int8: bool = False, fold: bool = True, **arguments: Any
) -> Path:
    """Export a model through Ultralytics, its activations folded; the model itself is not changed.

    Args:
        model: RTDETR or YOLO object.
        export_format: Ultralytics' name of the format, such as "onnx" (default), "openvino", "ncnn" or "engine".
        int8: Quantize weights and activations to 8 bits, calibrated on the training images of `data`, else of the data
            of the training. ONNX files are quantised by `quantise_onnx`, others by Ultralytics.
        fold: Fold the activations first.
        **arguments: Ultralytics' arguments of `export`, such as imgsz, dynamic, data and split.

    Returns:
        The file or folder written.

    Raises:
        InputError: The model cannot be exported to the format here: the format is unknown, a package is missing, there
            is no calibration data, or the disk is full. Files of an earlier export are then as they were.
    """
    export_format = check_export(model, export_format, int8=int8)
    batch = arguments.get("batch", 1)
    if not isinstance(batch, int) or batch < 1:  # that of a training may be a fraction of the GPU memory
        raise InputError(f"batch must be a positive number of images in an exported file, not {quote(batch)}")
    if int8:
        arguments = {"split": "train", **arguments, "data": arguments.get("data") or training_data(model)}
        arguments.update(_int8_argument())
    with exporting(fold=fold), only_warnings("nncf"):  # which names each of a hundred operators it leaves out
        return Path(model.export(format=export_format, **arguments))


@contextmanager
def exporting(*, fold: bool = True) -> Iterator[None]:
    """Let Ultralytics export as `export_model` does inside the block, models without a swap included.

    Args:
        fold: Fold the activations first.
    """
    global _fold_inside
    _fold_inside, before = fold, _fold_inside
    try:
        yield
    finally:
        _fold_inside = before


def is_our_export() -> bool:
    """Return whether an `exporting` block is open."""
    return _fold_inside is not None


def export_staged(original: Callable[..., Any], exporter: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run an exporter of Ultralytics on a prepared copy of a model, in a hidden folder whose files are moved last.

    Ultralytics writes beside the checkpoint, over the files that are there, so that a full disk would leave a truncated
    file in the place of a good one. A folder such as `best_openvino_model` replaces an older one as a whole. The
    callbacks `on_export_end` run after the files have been moved.

    Args:
        original: `Exporter.__call__`.
        exporter: The exporter.
        model: The task model.
        *args: Positional arguments of `original` after the model.
        **kwargs: Keyword arguments of `original`.

    Returns:
        What `original` returns, with the final path.

    Raises:
        InputError: The files cannot be written; older ones are then as they were.
    """
    copy = prepare_for_export(model, fold=_fold_inside is not False)
    file = _checkpoint_of(copy)
    if not file.name:  # not a task model: Ultralytics reports that it has no name
        return original(exporter, copy, *args, **kwargs)
    target = file.with_name(f"{file.stem}-export")
    stage = partial_path(target)
    suffix = ".pt"
    while suffix in str(stage / file.stem):  # Ultralytics replaces each ".pt" in the path by "_openvino_model"
        suffix += "_"
    staged = stage / f"{file.stem}{suffix}"
    copy.pt_path = str(staged)  # type: ignore[assignment]
    callbacks = exporter.callbacks.get("on_export_end", [])
    exporter.callbacks["on_export_end"] = []
    try:
        with _writing(file, stage):
            remove_leftovers(target)
            shutil.rmtree(stage, ignore_errors=True)  # left by a killed process that had this process's id
            stage.mkdir()
        run = partial(_export_int8, original) if is_int8_onnx(exporter.args) else original
        with edited_log(lambda text: _edit_paths(text, staged, file)):
            result = _run_exporter(run, file, stage, exporter, copy, *args, **kwargs)
        with _writing(file, stage):
            _write_final_paths(stage)
            moves = {file.with_name(path.name): path for path in stage.iterdir()}
            replaced = [path.name for path in moves if path.exists()]
            move_files_atomically(moves)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        exporter.callbacks["on_export_end"] = callbacks
    if replaced:
        log(f"replaced {', '.join(sorted(replaced))} of an earlier export")
    exporter.file = file
    exporter.run_callbacks("on_export_end")
    if not isinstance(result, (str, Path)):
        return result
    return type(result)(without_stage(str(result), stage))


def _checkpoint_of(model: Any) -> Path:
    """Return the path that Ultralytics derives the paths of the exported files from."""
    names = (getattr(model, "pt_path", None), getattr(model, "yaml_file", None))
    file = Path(next(filter(None, names), None) or getattr(model, "yaml", {}).get("yaml_file", ""))
    return Path(file.name) if file.suffix in (".yaml", ".yml") else file


def _export_int8(original: Callable[..., Any], exporter: Any, *args: Any, **kwargs: Any) -> str:
    """Export to ONNX in float32, quantise the file, and return the path of the one that takes its place."""
    with float_arguments(exporter.args), edited_log(_name_int8):
        path = original(exporter, *args, **kwargs)
    return str(quantise_exported(exporter, Path(path)))


def _name_int8(text: str) -> str:
    """Return a message of Ultralytics with the name of the quantised file, where it says how to use it."""
    return text.replace(".onnx", "_int8.onnx") if "Results saved to" in text else text


def _run_exporter(original: Callable[..., Any], file: Path, stage: Path, *args: Any, **kwargs: Any) -> Any:
    try:
        with _interruptible(), _torchscript_written_by_python():
            result = original(*args, **kwargs)
    # On a full disk OpenVINO raises a RuntimeError and removes its file, Python raises an OSError, and an assert of
    # Ultralytics fails on a truncated file.
    except Exception as error:
        if is_write_error(error):
            raise _not_written(file, stage, error) from error
        if full := _probe_disk(stage):
            raise _not_written(file, stage, full) from error
        if "onnx_opset_version" in str(error):  # "Unsupported onnx_opset_version: 30"
            raise InputError(f"this torch cannot write this opset of ONNX: {reason(error)}") from error
        raise
    if full := _probe_disk(stage):  # some tools ignore that a write failed
        raise _not_written(file, stage, full)
    return result


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C inside the block, in OpenVINO too.

    OpenVINO's frontend calls Python from C++, where an exception becomes a failed conversion or ends the process. So
    Ctrl-C is deferred until OpenVINO has returned. Any other exception that an exporter raises after a Ctrl-C becomes a
    KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[threading.Timer | None] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_inside("openvino", frame):
            timer = threading.Timer(0.1, interrupt_main)  # calls this handler again
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
def _torchscript_written_by_python() -> Iterator[None]:
    """Serialize TorchScript in memory: torch's own writer aborts the process on a full disk (2.4 and 2.15 do)."""
    script_module: Any = torch.jit.ScriptModule
    original = script_module.save

    def save(self: Any, f: str | os.PathLike[str], **kwargs: Any) -> None:
        Path(f).write_bytes(self.save_to_buffer(**kwargs))

    script_module.save = save
    try:
        yield
    finally:
        script_module.save = original


def _probe_disk(stage: Path) -> OSError | None:
    """Return the error of writing to the disk, at an offset of the size of the largest file there; None without one."""
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
    paths = [file.with_name(path.name) for path in stage.iterdir() if path.name != ".probe"] if stage.is_dir() else []
    names = ", ".join(quote(str(path)) for path in paths) or f"the exported files to {quote(str(file.parent))}"
    problem = getattr(error, "strerror", None) or reason(error)
    return InputError(f"cannot write {names}: {problem}; what was exported there before is as it was")


def _edit_paths(text: str, staged: Path, file: Path) -> str:
    """Return a message of Ultralytics with the final paths of the files, not those in the hidden folder."""
    if str(staged) in text:  # "starting from 'best.pt' with … (0.0 MB)": the staged checkpoint does not exist
        text = text.replace(str(staged), str(file)).replace("(0.0 MB)", f"({file_size(file):.1f} MB)")
    return without_stage(text, staged.parent) if staged.parent.name in text else text


def _write_final_paths(stage: Path) -> None:
    """Replace staged paths by the final ones in text files that contain paths, such as NCNN's `model_ncnn.py`."""
    for path in stage.rglob("*"):
        if path.suffix in _TEXT_SUFFIXES and path.is_file():
            text = path.read_bytes().decode(errors="surrogateescape")
            if stage.name in text:
                path.write_bytes(without_stage(text, stage).encode(errors="surrogateescape"))


def without_stage(text: str, stage: Path) -> str:
    """Return a text with the name of a hidden folder removed from its paths."""
    name = re.escape(stage.name)
    return re.sub(rf"{name}[/\\]|[/\\]?{name}", "", text)


def prepare_for_export(model: nn.Module, *, fold: bool = True) -> nn.Module:
    """Return a copy of a model for export: activations folded, and the rest in operators that exporters support.

    Args:
        model: Task model, which is not changed.
        fold: Fold the activations; where that fails, they are exported unfolded with a warning.
    """
    copy = deepcopy(model)
    if fold:
        try:
            if report := fold_activations(copy):
                log(f"{len(report)} activations folded into the weights, {len(report.kept)} kept")
        except RtdetrActError as error:
            log(f"exporting the activations unfolded: {error}", warn=True)
    replace_for_export(copy)
    return copy


def check_export(model: Any, export_format: str, *, int8: bool = False) -> str:
    """Check that a model can be exported to a format here.

    Args:
        model: RTDETR or YOLO object.
        export_format: Ultralytics' name of the format in any case, or an alias such as "tensorrt".
        int8: Whether it is to be quantized to 8 bits.

    Returns:
        Ultralytics' name of the format.

    Raises:
        InputError: The format is unknown, a package that it needs is missing, or it does not support the model.
    """
    known = list(exporter.export_formats()["Argument"])[1:]
    name = _ALIASES.get(export_format.lower(), export_format.lower())
    if name == "tflite" and name not in known and "litert" in known:
        name = "litert"  # since 8.4.83
    if name not in known:
        raise InputError(f"there is no export format {quote(name)} in Ultralytics {__version__}{suggest(name, known)}")
    if missing := _find_missing_packages(name, int8=int8):
        raise InputError(f"format={name} needs packages that are not installed: pip install {' '.join(missing)}")
    if name == "engine" and not torch.cuda.is_available():
        raise InputError("format=engine builds for the GPU it runs on, and there is none here")
    if name == "ncnn" and type(model.model.model[-1]).__name__ == "RTDETRDecoder":
        raise InputError(
            "NCNN cannot hold RT-DETR's decoder, whose operators work across the batch: use onnx or openvino"
        )
    if int8 and name not in {"onnx", *getattr(exporter, "INT8_FORMATS", _INT8_FORMATS)}:
        raise InputError(
            f"Ultralytics {__version__} has no INT8 export to {name}: use openvino, or a newer Ultralytics"
        )
    return name


def _find_missing_packages(name: str, *, int8: bool = False) -> list[str]:
    """Return the packages that an export to a format needs and that are not installed."""
    needed = {**_REQUIREMENTS.get(name, {}), **(_INT8_REQUIREMENTS.get(name, {}) if int8 else {})}
    return [package for module, package in needed.items() if find_spec(module) is None]


def list_missing_tools() -> dict[str, list[str]]:
    """Return for each export format the packages that it needs and that are not installed here.

    Formats of which it is not known which packages they need are left out.
    """
    known = list(exporter.export_formats()["Argument"])[1:]
    return {name: _find_missing_packages(name) for name in known if name in _REQUIREMENTS}


def list_exports(model: Any) -> dict[str, str]:
    """Return for each export format whether a model can be exported to it here: "" if so, else the reason if not.

    Formats of which it is not known which packages they need are left out.

    Args:
        model: RTDETR or YOLO object.
    """
    found = {}
    for name in list_missing_tools():
        try:
            check_export(model, name)
            found[name] = ""
        except InputError as error:
            found[name] = str(error)
    return found


def _int8_argument() -> dict[str, Any]:
    return {"quantize": 8} if "quantize" in DEFAULT_CFG_DICT else {"int8": True}
