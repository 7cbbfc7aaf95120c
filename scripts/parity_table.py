"""The table of `scripts/parity.py`: what each export format made of each activation, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

# OpenVINO computes in bfloat16 by itself on CPUs that have it; that is its precision, not its export.
DEFAULT = "openvino, its default precision"
# How far torch itself is from torch in float64 says how well a network is conditioned.
DOUBLE = "torch, float64"
COLUMNS = (DOUBLE, "torchscript", "onnx", "openvino", DEFAULT, "ncnn")
_PREFACE = """Made by `make parity`: every activation at all convolutional sites, with parameters away from their start.
The largest difference of a score or of a box (in units of the image) from torch, unfolded and unfused, on six images;
and how many of torch's 50 best detections of each image the file finds again (same class, IoU of 0.9, score within
0.02). OpenVINO is run in float32, and in the precision that it takes by itself: bfloat16 on a CPU that has it, where
the differences are that precision's, not the export's.

The first column is torch in float64 instead of a file: what rounding alone changes. Where that is much, or a format is
off by more than 1e-4, the activation is to blame, not the export: `tanhshrink` subtracts nearly equal numbers,
`hardshrink` and `threshold` jump, and a chain of products as in `glu` adds errors up. With `softmax` and `softmin` the
scores in yolo11n differ by 6e-9 from one to the next, so that NMS takes others of the same kind: errors of 5e-7, but
few matches, in float64 as well. `apa` raises to the power of 1/λ, up to 10,000 here, which shows how OpenVINO and NCNN
approximate: with λ of 0.3 and more, both are off by 1e-6. NCNN keeps the weights of the fully connected layers in
`meta_aconc` in float16; told not to (`opt.use_fp16_storage`), it is off by 6e-5. `squared_relu` and `star_relu` square
outliers again at each site, so that rounding alone changes what is found, in float64 as well. A detection or two may be
missed where NMS keeps a box in one and drops it in the other, its overlap being just at the limit."""
# What was found, by model, activation and column.
ParityTable: TypeAlias = dict[str, dict[str, dict[str, str]]]


def read_table(path: Path) -> ParityTable:
    """Return the table in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    table: ParityTable = json.loads(path.read_text(encoding="utf-8"))
    return table


def format_table(table: ParityTable) -> str:
    """Return the table as JSON, a line per cell."""
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def merge_rows(table: ParityTable, model: str, rows: Mapping[str, dict[str, str]]) -> ParityTable:
    """Return the table with some rows of a model added or replaced, its rows sorted by the name of the activation."""
    merged = {**table.get(model, {}), **rows}
    return {**table, model: {name: merged[name] for name in sorted(merged)}}


def compose_markdown(table: ParityTable) -> str:
    """Return the table in Markdown, a section per model; why a format was refused stands below it."""
    lines = ["# Exported files against torch", "", *_PREFACE.splitlines(), ""]
    for model, rows in table.items():
        refusals = {cell for cells in rows.values() for cell in cells.values() if cell.startswith("refused")}
        lines += [
            f"## {model}",
            "",
            "| activation | " + " | ".join(COLUMNS) + " |",
            "|---" * (1 + len(COLUMNS)) + "|",
        ]
        for name, cells in rows.items():
            shown = [cells.get(column, "-") for column in COLUMNS]
            shown = ["refused" if cell.startswith("refused") else cell for cell in shown]
            lines.append("| " + " | ".join([name, *shown]) + " |")
        lines += ["", *sorted(refusals), ""]
    return "\n".join(lines)
