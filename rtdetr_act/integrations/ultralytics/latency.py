"""Measure latency, size and scores of exported models, in several formats, all in one run."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from ultralytics.nn.autobackend import AutoBackend

from rtdetr_act.analysis.figures import COLOURS, TWO_COLUMNS, figure_style, render_figure
from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import InputError
from rtdetr_act.files import (
    convert_write_errors,
    create_folder,
    move_files_atomically,
    output_folder,
    partial_path,
    remove_leftovers,
    write_files_atomically,
)
from rtdetr_act.integrations.ultralytics.arguments import check_positive_integers
from rtdetr_act.integrations.ultralytics.datasets import training_data
from rtdetr_act.integrations.ultralytics.export import check_export, export_model, without_stage
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.log import log_level
from rtdetr_act.integrations.ultralytics.models import save_checkpoint
from rtdetr_act.integrations.ultralytics.results import format_scores, read_scores
from rtdetr_act.integrations.ultralytics.runs import slug
from rtdetr_act.results import Result, to_plain
from rtdetr_act.timing import Ratio, compute_ratios, time_rounds

TORCH = "torch"  # the format that is not exported
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Export:
    """A format to export to, quantized to 8 bits or not."""

    format: str
    int8: bool = False

    def __str__(self) -> str:
        """Return the name of the format, followed by " int8" where it is quantized."""
        return f"{self.format} int8" if self.int8 else self.format


@dataclass(frozen=True, repr=False)
class Latency(Result):
    """Latency, size and scores of one variant in one format.

    Attributes:
        activation: Name of the variant: its plan, "stock", or the name of the run.
        format: "torch", "onnx", "openvino" and so on, followed by " int8" where it is quantized.
        median: Median time of one image, in ms, without pre- and postprocessing.
        p95: 95th percentile of that time, in ms.
        ratio: Time relative to that of the first variant in the same format, paired within each round.
        parameters: Number of parameters of the folded model.
        gflops_640: Floating-point operations for one image of 640 x 640 pixels, activations included, in 1e9.
        megabytes: Size of the file, or of all files of the folder, in 1e6 bytes.
        path: The file or folder.
        scores: The two headline scores of the task on the data given; None without data.
        imgsz: Side of the square image that the time, the scores and `gflops` are of, in pixels.
        gflops: Floating-point operations for one image of that size, activations included, in 1e9.
    """

    activation: str
    format: str
    median: float
    p95: float
    ratio: Ratio
    parameters: int
    gflops_640: float
    megabytes: float
    path: str
    scores: dict[str, float] | None
    imgsz: int
    gflops: float

    def _summarise(self) -> str:
        """Return activation, format, time and scores."""
        scores = format_scores(self.scores)
        return ", ".join([self.activation, self.format, f"{self.median:.2f} ms", *scores])


def measure_latencies(
    models: Mapping[str, Any],
    formats: Sequence[str],
    folder: Path,
    *,
    imgsz: int = 224,
    rounds: int = 100,
    int8: bool = False,
    data: str | None = None,
) -> list[Latency]:
    """Export variants of a model, and measure the files on the CPU, in interleaved rounds.

    Args:
        models: RTDETR or YOLO objects by name, the reference first. Their activations are folded in place.
        formats: Formats to export to, of those that run here: "onnx", "openvino", "torchscript", "ncnn". PyTorch itself
            is always measured.
        folder: Folder of the exported files. They are put there once all are measured; until then, older ones stay.
        imgsz: Side of the image, in pixels.
        rounds: Rounds of three measurements each.
        int8: Also quantize to 8 bits, where the format can, calibrated on `data`, else on the data of the training.
        data: Data set to score every file on; None (default) for no scores.

    Returns:
        One latency per format and variant, in that order.

    Raises:
        InputError: A format cannot be exported or run here, or the folder cannot be written to.
    """
    check_positive_integers(imgsz=imgsz, rounds=rounds)
    exports = [Export(name) for name in formats]
    exports += [Export(name, int8=True) for name in formats if int8 and name in ("onnx", "openvino")]
    for model in models.values():
        for export in exports:
            check_export(model, export.format, int8=export.int8)
            if export.int8 and data is None:
                training_data(model)
    with _staged(folder) as stage, log_level(logging.WARNING):
        latencies = _measure(models, exports, stage, imgsz, rounds, data)
    return [replace(each, path=str(folder / Path(each.path).relative_to(stage))) for each in latencies]


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder; at the end, move the files in its subfolders to the same subfolders of `folder`."""
    target = folder / "exported"
    stage = partial_path(target)
    with output_folder(folder):
        remove_leftovers(target)
        shutil.rmtree(stage, ignore_errors=True)  # left by a killed process that had this process's id
        try:
            stage.mkdir()
            yield stage
            staged = {folder / path.relative_to(stage): path for path in stage.glob("*/*")}
            with convert_write_errors(folder), ExitStack() as stack:
                for parent in {path.parent for path in staged}:
                    stack.enter_context(create_folder(parent))
                move_files_atomically(staged)
        except InputError as error:  # its path may be that of the hidden folder
            raise InputError(without_stage(str(error), stage)) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _measure(
    models: Mapping[str, Any], exports: Sequence[Export], folder: Path, imgsz: int, rounds: int, data: str | None
) -> list[Latency]:
    paths: dict[str, dict[str, Path]] = {TORCH: {}}
    for number, (name, model) in enumerate(models.items(), 1):
        fold_activations(model)
        own = folder / slug(name)
        paths[TORCH][name] = _save(model, (folder / f"{slug(name)}-{number}" if own.exists() else own) / "model.pt")
        for export in exports:
            calibration: dict[str, Any] = {"data": data} if export.int8 else {}
            path = export_model(model, export.format, int8=export.int8, imgsz=imgsz, **calibration)
            paths.setdefault(str(export), {})[name] = path
    gflops = {name: (count_gflops(model.model), count_gflops(model.model, imgsz)) for name, model in models.items()}
    latencies = []
    for export_format in sorted(paths, key=lambda name: (name != TORCH, name)):
        # One format at a time, so that the threads of one runtime do not slow down those of another.
        calls = {name: load_runner(path, imgsz) for name, path in paths[export_format].items()}
        times = time_rounds(calls, rounds, repeat=4)
        medians = {name: [statistics.median(turn) for turn in each] for name, each in times.items()}
        for name, path in paths[export_format].items():
            milliseconds = np.concatenate(times[name]) * 1e3
            latencies.append(
                Latency(
                    activation=name,
                    format=export_format,
                    median=float(np.median(milliseconds)),
                    p95=float(np.percentile(milliseconds, 95)),
                    ratio=compute_ratios(medians, next(iter(models)))[name],
                    parameters=sum(parameter.numel() for parameter in models[name].model.parameters()),
                    gflops_640=gflops[name][0],
                    megabytes=_size(path) / 1e6,
                    path=str(path),
                    scores=score_export(models[name], path, data, imgsz) if data else None,
                    imgsz=imgsz,
                    gflops=gflops[name][1],
                )
            )
    return latencies


def _save(model: Any, path: Path) -> Path:
    """Write a checkpoint as Ultralytics does, and make it the one that exports are written beside."""
    with convert_write_errors(path):
        path.parent.mkdir()
    save_checkpoint(model, path)
    model.model.pt_path = str(path)
    return path


def load_runner(path: Path, imgsz: int, threads: int | None = None) -> Callable[[], Any]:
    """Return a function that runs an exported file or a checkpoint on one random image, as Ultralytics' predict does.

    ONNX Runtime's threads wait for work by spinning. With several sessions in one process they slow down one another
    (three equal ones on two cores: 95th percentile 30 ms for a median of 14 ms, ratios of 0.7 to 1.5), so spinning is
    switched off.

    Args:
        path: File or folder, such as `best.onnx` or `best_openvino_model`.
        imgsz: Side of the image, in pixels.
        threads: Threads of ONNX Runtime; None (default) for one per core. Other runtimes choose by themselves.
    """
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: image.numpy()}
        return lambda: session.run(None, inputs)

    backend = AutoBackend(str(path), device=torch.device("cpu"), verbose=False).eval()

    def call() -> Any:
        with torch.inference_mode():
            return backend(image)

    return call


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def score_export(model: Any, path: Path, data: str, imgsz: int) -> dict[str, float]:
    """Return the two headline scores of an exported file or a checkpoint on the validation images of a data set.

    Args:
        model: RTDETR or YOLO object of the same network.
        path: File or folder, such as `best.onnx` or `best_openvino_model`.
        data: The data set, as `resolve_data` returns it.
        imgsz: Side of the images, in pixels.

    Raises:
        InputError: Ultralytics cannot use the file or the data.
    """
    # An exported file takes one square image at a time. So does the checkpoint, to be scored on the same images.
    cls = type(model)
    loaded = cls(str(path)) if cls.__name__ == "RTDETR" else cls(str(path), task=model.task)
    settings: dict[str, Any] = {"batch": 1, "rect": False, "workers": 0, "plots": False, "verbose": False}
    with translate_errors():
        return read_scores(loaded.val(data=data, imgsz=imgsz, device="cpu", **settings))


def write_latencies(latencies: Sequence[Latency], folder: Path, name: str) -> list[Path]:
    """Write latencies as `<name>.json` and, if they have scores, draw them as `<name>.png`, both files or neither.

    Args:
        latencies: At least one.
        folder: Folder of the files, which is made if need be.
        name: Name of the files.

    Returns:
        The paths written.

    Raises:
        InputError: The folder cannot be written to; its files are then as they were.
    """
    contents = {folder / f"{name}.json": json.dumps(to_plain(latencies), indent=1).encode()}
    if all(latency.scores for latency in latencies):
        contents[folder / f"{name}.png"] = render_figure(draw_pareto(latencies))
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically(contents)
    return list(contents)


@figure_style()
def draw_pareto(latencies: Sequence[Latency]) -> Figure:
    """Draw score against latency: a colour per activation, a marker per format, and the Pareto front of each format.

    Args:
        latencies: Latencies with scores; the last score of each is drawn.
    """
    activations = list(dict.fromkeys(latency.activation for latency in latencies))
    formats = list(dict.fromkeys(latency.format for latency in latencies))
    score = list(latencies[0].scores or {})[-1]
    figure = Figure(figsize=(TWO_COLUMNS, 4.5))
    axes = figure.subplots()
    for index, export_format in enumerate(formats):
        own = [latency for latency in latencies if latency.format == export_format]
        points = [(latency.median, (latency.scores or {})[score], latency.activation) for latency in own]
        for x, y, activation in points:
            colour = COLOURS[activations.index(activation) % len(COLOURS)]
            axes.plot(x, y, _MARKERS[index % len(_MARKERS)], color=colour, markersize=8)
        front = pareto_front([(x, y) for x, y, _ in points])
        axes.plot([x for x, _ in front], [y for _, y in front], color="grey", linestyle="-", linewidth=0.8, zorder=0)
    for index, activation in enumerate(activations):
        axes.plot([], [], "s", color=COLOURS[index % len(COLOURS)], label=activation)
    for index, export_format in enumerate(formats):
        axes.plot([], [], _MARKERS[index % len(_MARKERS)], color="black", fillstyle="none", label=export_format)
    axes.set(xlabel="median latency of an image, ms", ylabel=score, xlim=(0, None))
    figure.legend(loc="outside right upper")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (time, score) on the Pareto front, fastest first: no other is both faster and better.

    >>> pareto_front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.6)])
    [(1.0, 0.5), (3.0, 0.6)]
    """
    front: list[tuple[float, float]] = []
    for time, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((time, score))
    return front
