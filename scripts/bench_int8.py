"""INT8 against float32 in ONNX Runtime: what is fused, how long it takes, what it costs in mAP, and in which layer.

    python scripts/bench_int8.py a/best.pt b/best.pt --data bccd.yaml --imgsz 320 --imgsz 640 [--rounds 60]

Each checkpoint is exported twice at each size, in float32 and in 8 bits calibrated on training images. The latency of
the two is measured in interleaved rounds in one process, with one thread and with one per core; the scores at the size
of the training; and the error of each layer's output there, on validation images. Writes int8.json, int8.md, and the
picture int8.png with a line per checkpoint.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
import onnxruntime
import typer
from ultralytics.utils import LOGGER

from rtdetr_act.analysis.figures import write_figure
from rtdetr_act.analysis.quantisation_figure import draw_quantisation_errors
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.export import export_model
from rtdetr_act.integrations.ultralytics.images import training_imgsz
from rtdetr_act.integrations.ultralytics.int8 import measure_int8
from rtdetr_act.integrations.ultralytics.latency import load_runner, score_export
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

THREADS = {"1 thread": 1, "all threads": None}


@dataclass(frozen=True)
class Files:
    """A checkpoint, exported at one size in float32 and in 8 bits."""

    original: Path
    quantised: Path


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Trained checkpoints.")],
    data: Annotated[str, typer.Option(help="Data set to calibrate and to score on.")],
    imgsz: Annotated[list[int] | None, typer.Option(help="Sizes to time at; that of the training if none.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of three measurements.")] = 60,
    images: Annotated[int, typer.Option(min=1, help="Validation images for the errors of the layers.")] = 16,
    output: Annotated[Path, typer.Option(help="Folder for all files.")] = Path("runs/int8"),
) -> None:
    """Export, time, score, and write the tables."""
    LOGGER.setLevel(logging.ERROR)
    known = resolve_data(data)
    rows, errors = [], {}
    for path in checkpoints:
        model = load_checkpoint(path)
        name = f"{path.parent.parent.name or path.parent.name}-{path.stem}"
        size = training_imgsz(model, 640)
        files = {each: export_both(model, output / name / str(each), each, known) for each in {size, *(imgsz or ())}}
        times = {each: measure_times(files[each], each, rounds) for each in imgsz or (size,)}
        scores = [score_export(model, file, known, size) for file in (files[size].original, files[size].quantised)]
        errors[name] = measure_int8(
            model, files[size].original, files[size].quantised, check_data(known, model.task), size, images
        )
        row = {
            "checkpoint": name,
            "imgsz": size,
            "megabytes": [file.stat().st_size / 1e6 for file in (files[size].original, files[size].quantised)],
            "operators": count_fused(files[size].quantised),
            "times": {str(each): {key: asdict(ratio) for key, ratio in found.items()} for each, found in times.items()},
            "scores": scores,
            "drops": [(tensor.name, tensor.drop) for tensor in errors[name].find_drops()],
        }
        rows.append(row)
        (output / "int8.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (output / "int8.md").write_text(format_rows(rows), encoding="utf-8")
        errors[name].to_csv(output / f"{name}.csv")
        print(format_rows([row]), flush=True)
    write_figure(draw_quantisation_errors(errors), output / "int8.png")


def export_both(model: Any, folder: Path, imgsz: int, data: str) -> Files:
    """Export a model in both precisions, where that is not done already."""
    folder.mkdir(parents=True, exist_ok=True)
    model.model.pt_path = str(folder / "model.pt")
    files = Files(folder / "model.onnx", folder / "model_int8.onnx")
    if not files.original.exists():
        export_model(model, imgsz=imgsz)
    if not files.quantised.exists():
        export_model(model, int8=True, imgsz=imgsz, data=data)
    return files


def measure_times(files: Files, imgsz: int, rounds: int) -> dict[str, Ratio]:
    """Return the time in 8 bits relative to that in float32, by the number of threads."""
    found = {}
    for name, threads in THREADS.items():
        calls = {key: load_runner(path, imgsz, threads) for key, path in asdict(files).items()}
        found[name] = compute_ratios(time_medians(calls, rounds, repeat=4), "original")["quantised"]
    return found


def count_fused(path: Path) -> dict[str, int]:
    """Count the operators of the graph that ONNX Runtime runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        options.log_severity_level = 3  # it says that such a file is for this machine only
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = ["| checkpoint | mAP50-95, float32 | INT8 | pixels | 1 thread | all threads |", "|---|---|---|---|---|---|"]
    for row in rows:
        before, after = (list(scores.values())[-1] for scores in row["scores"])
        for imgsz, times in row["times"].items():
            ratios = " | ".join(str(Ratio(**times[key])) for key in THREADS)
            lines.append(f"| {row['checkpoint']} | {before:.4f} | {after:.4f} | {imgsz} | {ratios} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
