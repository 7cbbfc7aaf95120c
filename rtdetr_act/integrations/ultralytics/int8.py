"""INT8 exports to ONNX: Ultralytics exports in float32 and the file is quantised here, with each of its releases."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.data.augment import LetterBox
from ultralytics.utils.files import file_size

from rtdetr_act.analysis.quantisation_error import QuantisationErrors, measure_quantisation
from rtdetr_act.deploy.quantise import quantise_onnx
from rtdetr_act.errors import InputError
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.images import load_batches, pick_images
from rtdetr_act.integrations.ultralytics.log import log, log_level

# Of the calibration split, evenly spaced. yolo11n with ReLU scores 0.487, 0.488 and 0.486 on BCCD with 32, 64 and 128.
CALIBRATION_IMAGES = 64


def is_int8_onnx(args: Any) -> bool:
    """Return whether an exporter is asked for an ONNX file in 8 bits.

    Args:
        args: Arguments of an exporter of Ultralytics.
    """
    is_int8 = getattr(args, "quantize", None) == 8 or bool(getattr(args, "int8", False))
    return is_int8 and str(args.format).lower() == "onnx"


@contextmanager
def float_arguments(args: Any) -> Iterator[None]:
    """Let an exporter write float32 inside the block, and not read its arguments of a calibration.

    Releases without an INT8 export to ONNX refuse those arguments.

    Args:
        args: Arguments of an exporter of Ultralytics.
    """
    before = {name: getattr(args, name) for name in ("int8", "quantize", "data", "fraction") if hasattr(args, name)}
    for name in before:
        setattr(args, name, DEFAULT_CFG_DICT.get(name))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


class _CalibrationImages(Sequence[np.ndarray[Any, Any]]):
    """Images as an exported file takes them, (1, C, H, W) in float32, converted when they are indexed."""

    def __init__(self, images: Sequence[Tensor], batch: int) -> None:
        self._images, self._batch = images, batch

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> np.ndarray[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray[Any, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _CalibrationImages(self._images[index], self._batch)
        image = self._images[index]
        pixels = image.numpy()[None].astype(np.float32) / (1 if image.is_floating_point() else 255)
        return np.repeat(pixels, self._batch, axis=0)


def load_calibration_images(exporter: Any) -> Sequence[np.ndarray[Any, Any]]:
    """Return evenly spaced images of the calibration split, as the exported model gets them when it predicts.

    Ultralytics pads all of them to the shape of the input; for RT-DETR they are stretched to it, as for prediction.

    Args:
        exporter: Exporter of Ultralytics after its export.

    Raises:
        InputError: No data set is named, or the split has no images.
    """
    if not exporter.args.data:
        raise InputError("INT8 takes images to calibrate on: name a data set with data=")
    with log_level(logging.ERROR):  # it recommends 300 images, of which fewer are used
        dataset = exporter.get_int8_calibration_dataloader().dataset
    transforms = getattr(getattr(dataset, "transforms", None), "transforms", None)
    if transforms and isinstance(transforms[0], LetterBox):
        stretch = type(exporter.model.model[-1]).__name__ == "RTDETRDecoder"
        transforms[0] = LetterBox(tuple(exporter.imgsz), False, stretch)  # older releases: scaleFill for scale_fill
    return _CalibrationImages(pick_images(dataset, min(CALIBRATION_IMAGES, len(dataset))), exporter.args.batch)


def quantise_exported(exporter: Any, path: Path) -> Path:
    """Quantise an exported ONNX file, replace it by `<name>_int8.onnx` as Ultralytics calls it, and return its path.

    Args:
        exporter: Exporter of Ultralytics after its export.
        path: The file that it has written.

    Raises:
        InputError: There is nothing to calibrate on, or nothing that can be quantised.
        OSError: The file cannot be written.
    """
    output = path.with_name(f"{path.stem}_int8{path.suffix}")
    images = load_calibration_images(exporter)
    result = quantise_onnx(path, output, images)
    _record_precision(output)
    path.unlink()
    total = len(result.quantised) + len(result.left)
    log(
        f"{len(result.quantised)} of {format_count(total, 'layer')} quantised, calibrated on "
        f"{format_count(len(images), 'image')}, saved as '{output}' ({file_size(output):.1f} MB)"
    )
    return output


def _record_precision(path: Path) -> None:
    """Correct the argument `quantize` in Ultralytics' metadata, which are those of the export in float32."""
    import onnx

    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "args":
            args = ast.literal_eval(entry.value)
            if "quantize" in args:
                entry.value = str({**args, "quantize": 8})
                onnx.save(model, path)


def measure_int8(
    model: Any, original: Path, quantised: Path, data: Mapping[str, Any], imgsz: int, images: int = 16
) -> QuantisationErrors:
    """Measure the error of each activation tensor of an INT8 export to ONNX on validation images.

    Args:
        model: RTDETR or YOLO object that was exported.
        original: Its export to ONNX in float32, of square images.
        quantised: Its export to ONNX in 8 bits.
        data: The data set as `check_data` returns it.
        imgsz: Side of the exported images, in pixels.
        images: Number of images; fewer where the split has fewer.

    Raises:
        InputError: Ultralytics cannot use the data, or the files are not of one network.
    """
    batches = load_batches(model, data, images, imgsz, batch=1)
    return measure_quantisation(original, quantised, (batch["img"].numpy() for batch in batches))
