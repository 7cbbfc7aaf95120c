"""What the activations of the zoo cost, and which formats hold them, as measured by `scripts/bench_acts.py`.

The figures are in `measured.csv`, one row per activation, with the machine that each row was measured on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.csv")
FORMATS = ("torchscript", "onnx", "openvino", "ncnn")
LARGEST_ERROR = 1e-4  # what rounding alone may change in a model; beyond that a format is said to be off


@dataclass(frozen=True)
class Measured:
    """The measurements of one activation, a row of the file.

    Times are those of the module alone on float32 maps, in units of SiLU: medians and quartiles over rounds, each of
    which gives the median over three shapes of the ratio to SiLU.

    Attributes:
        activation: Its registered name.
        train: Time of forward and backward.
        train_low: Its first quartile.
        train_high: Its third quartile.
        inference: Time of a forward in evaluation mode, without gradients.
        inference_low: Its first quartile.
        inference_high: Its third quartile.
        kept: Bytes kept for the backward, per element of the float32 input. Input and output count where the backward
            reads them, the parameters do not.
        kept_output: How many of these are the output's, which the next layer keeps anyway.
        error: Largest difference to an independent formula, both in float64, with parameters away from their start;
            None if there is none.
        error_float32: The same of the module in float32.
        gradcheck: Whether `torch.autograd.gradcheck` passed.
        torchscript: What `scripts/parity.py` found with it at all convolutional sites of yolo11n: the largest
            difference of a score or box between torch and the exported file, "refused" or "not finite"; "" if that was
            not tried.
        onnx: The same of ONNX.
        openvino: The same of OpenVINO in float32.
        ncnn: The same of NCNN.
        machine: What the times were measured on, and when.
    """

    activation: str
    train: float
    train_low: float
    train_high: float
    inference: float
    inference_low: float
    inference_high: float
    kept: float
    kept_output: float
    error: float | None
    error_float32: float | None
    gradcheck: bool
    torchscript: str = ""
    onnx: str = ""
    openvino: str = ""
    ncnn: str = ""
    machine: str = ""

    @property
    def exports(self) -> dict[str, str]:
        """What was found for each export format that was tried, by format."""
        return {form: found for form in FORMATS if (found := getattr(self, form))}


COLUMNS = tuple(each.name for each in fields(Measured))
_TEXT = ("activation", *FORMATS, "machine")


def list_working(exports: Mapping[str, str]) -> list[str]:
    """Return the formats that hold an activation, of what was found for each.

    >>> list_working({"onnx": "2e-06", "ncnn": "refused"})
    ['onnx']
    """
    return [form for form, found in exports.items() if _parse_error(found) is not None]


def list_inaccurate(exports: Mapping[str, str]) -> list[str]:
    """Return the formats whose files differ from torch by more than 1e-4, of what was found for each.

    >>> list_inaccurate({"onnx": "2e-06", "openvino": "1e-02", "ncnn": "refused"})
    ['openvino']
    """
    errors = {form: _parse_error(found) for form, found in exports.items()}
    return [form for form, error in errors.items() if error is not None and error > LARGEST_ERROR]


def _parse_error(found: str) -> float | None:
    try:
        return float(found)
    except ValueError:  # "refused" or "not finite"
        return None


def read_measured(path: Path = FILE) -> dict[str, Measured]:
    """Return the measurements by the name of the activation.

    >>> read_measured()["silu"].gradcheck
    True
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{column: _parse_cell(column, row[column]) for column in COLUMNS} for row in csv.DictReader(file)]
    return {row["activation"]: Measured(**row) for row in rows}


def _parse_cell(column: str, cell: str) -> Any:
    if column in _TEXT:
        return cell
    if not cell:
        return None
    return cell == "true" if column == "gradcheck" else float(cell)
