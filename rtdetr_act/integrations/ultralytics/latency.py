"""What each activation costs and scores where it is deployed: latency, size, and mAP, in each format, in one run."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import LOGGER

from rtdetr_act.analysis.figures import COLOURS, render_figure
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
from rtdetr_act.integrations.ultralytics.arguments import check_counts
from rtdetr_act.integrations.ultralytics.datasets import training_data
from rtdetr_act.integrations.ultralytics.export import check_export, export_model, without_stage
from rtdetr_act.integrations.ultralytics.failures import one_sentence
from rtdetr_act.integrations.ultralytics.results import read_scores
from rtdetr_act.integrations.ultralytics.runs import slug
from rtdetr_act.timing import Ratio, compute_ratios, time_rounds

TORCH = "torch"
_MARKS = "osD^vP*X"
_DPI = 110


@dataclass(frozen=True)
class Latency:
    """One activation in one format.

    Attributes:
        activation: The plan, "stock", or the name of the run.
        format: "torch", "onnx", "openvino", …, with " int8" behind it where quantised.
        median: Median time of one image, in ms, batch 1, pre- and postprocessing left out.
        p95: Its 95th percentile, in ms.
        ratio: The time in units of the first activation's in the same format, turn by turn.
        parameters: Parameters of the folded network.
        gflops: Its operations for one image, activations included, in 1e9.
        megabytes: Size of the file, or of all files of the folder, in 1e6 bytes.
        path: The file or folder.
        scores: The two headline scores of the task on the data given, or None.
    """

    activation: str
    format: str
    median: float
    p95: float
    ratio: Ratio
    parameters: int
    gflops: float
    megabytes: float
    path: str
    scores: dict[str, float] | None = None


def bench_formats(
    models: Mapping[str, Any],
    forms: Sequence[str],
    folder: Path,
    *,
    imgsz: int = 224,
    turns: int = 100,
    int8: bool = False,
    data: str | None = None,
) -> list[Latency]:
    """Export variants of a model, and measure them in turns on the CPU.

    Args:
        models: RTDETR or YOLO objects by the name of their activation; the first is what others are compared with.
        forms: Formats beside torch, of those that run here: "onnx", "openvino", "torchscript", "ncnn".
        folder: Where the files go, when all of them were measured; until then those there are as they were.
        imgsz: Side of the image, in pixels.
        turns: Turns of three measurements each.
        int8: Also quantise, to those of the formats that can be, calibrated on `data`.
        data: Data set to score every file on; None for no scores.

    Returns:
        One entry per format and activation, in that order.

    Raises:
        InputError: A format cannot be exported or run here, or the folder cannot be written to.
    """
    check_counts(imgsz=imgsz, turns=turns)
    wanted = [(form, False) for form in forms]
    wanted += [(form, True) for form in forms if int8 and form in ("onnx", "openvino")]
    for model in models.values():
        for form, quantised in wanted:
            check_export(model, form, int8=quantised)
            if quantised and data is None:
                training_data(model)
    with _staged(folder) as stage, _quiet():
        found = _measure(models, wanted, stage, imgsz, turns, data)
    return [replace(each, path=str(folder / Path(each.path).relative_to(stage))) for each in found]


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give the body a hidden folder to fill, a folder per variant in it, and move what is in these to their places."""
    target = folder / "exported"
    stage = partial_path(target)
    with output_folder(folder):
        remove_leftovers(target)
        shutil.rmtree(stage, ignore_errors=True)  # of a killed process with this one's number
        try:
            stage.mkdir()
            yield stage
            found = {folder / path.relative_to(stage): path for path in stage.glob("*/*")}
            with convert_write_errors(folder), ExitStack() as stack:
                for parent in {path.parent for path in found}:
                    stack.enter_context(create_folder(parent))
                move_files_atomically(found)
        except InputError as error:  # of what cannot be written there
            raise InputError(without_stage(str(error), stage)) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ultralytics from describing each of many exports and validations; warnings still show."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def _measure(
    models: Mapping[str, Any],
    wanted: Sequence[tuple[str, bool]],
    folder: Path,
    imgsz: int,
    turns: int,
    data: str | None,
) -> list[Latency]:
    files: dict[str, dict[str, Path]] = {TORCH: {}}
    for number, (name, model) in enumerate(models.items(), 1):
        fold_activations(model)
        place = folder / slug(name)
        files[TORCH][name] = _save(model, (folder / f"{slug(name)}-{number}" if place.exists() else place) / "model.pt")
        for form, quantised in wanted:
            more: dict[str, Any] = {"data": data, "split": "train"} if quantised else {}
            path = export_model(model, form, int8=quantised, imgsz=imgsz, **more)
            files.setdefault(f"{form} int8" if quantised else form, {})[name] = path
    gflops = {name: count_gflops(model.model, imgsz) for name, model in models.items()}
    found = []
    for form in sorted(files, key=lambda form: (form != TORCH, form)):
        # A format at a time, so that the threads of one runtime do not hold up those of another.
        calls = {name: runner(path, imgsz) for name, path in files[form].items()}
        rows = time_rounds(calls, turns, repeat=4)
        middles = {name: [statistics.median(row) for row in each] for name, each in rows.items()}
        for name, path in files[form].items():
            every = np.concatenate(rows[name]) * 1e3
            found.append(
                Latency(
                    activation=name,
                    format=form,
                    median=float(np.median(every)),
                    p95=float(np.percentile(every, 95)),
                    ratio=compute_ratios(middles, next(iter(models)))[name],
                    parameters=sum(parameter.numel() for parameter in models[name].model.parameters()),
                    gflops=gflops[name],
                    megabytes=_size(path) / 1e6,
                    path=str(path),
                    scores=_score(models[name], path, data, imgsz) if data else None,
                )
            )
    return found


def _save(model: Any, path: Path) -> Path:
    """Write a checkpoint in Ultralytics' way, and let exports go to its side."""
    model.ckpt = model.ckpt or {}  # None in 8.3 for a model made from a YAML
    content = io.BytesIO()  # torch's own writer knows no errno
    model.save(content)
    with convert_write_errors(path):
        path.parent.mkdir()
        path.write_bytes(content.getvalue())
    model.model.pt_path = str(path)
    return path


def runner(path: Path, imgsz: int) -> Callable[[], Any]:
    """Return a call that runs a file on one image, as Ultralytics' predict does.

    ONNX Runtime's threads wait for more work by spinning. With several sessions in one process they hold up one another
    (three alike on two cores: 95th percentile 30 ms for a median of 14, ratios of 0.7 to 1.5), so here they sleep.
    """
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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


def _score(model: Any, path: Path, data: str, imgsz: int) -> dict[str, float]:
    # An exported file takes square batches of one; so does the checkpoint here, or it would see other images.
    kind = type(model)
    loaded = kind(str(path)) if kind.__name__ == "RTDETR" else kind(str(path), task=model.task)
    settings: dict[str, Any] = {"batch": 1, "rect": False, "workers": 0, "plots": False, "verbose": False}
    with one_sentence():
        return read_scores(loaded.val(data=data, imgsz=imgsz, device="cpu", **settings))


def print_latencies(title: str, found: Sequence[Latency]) -> None:
    """Print latencies as a table."""
    scores = list(dict.fromkeys(name for entry in found for name in entry.scores or {}))
    table = Table(title=title)
    table.add_column("activation", overflow="fold")
    table.add_column("format")
    for column in ("ms", "p95", f"/ {found[0].activation}", "parameters", "GFLOPs", "MB", *scores):
        table.add_column(column, justify="right")
    for entry in found:
        ratio = str(entry.ratio) if entry.activation != found[0].activation else "1"
        cells = f"{entry.median:.2f}", f"{entry.p95:.2f}", ratio, f"{entry.parameters:,}", f"{entry.gflops:.3f}"
        marks = [f"{(entry.scores or {}).get(name, math.nan):.3f}" for name in scores]
        table.add_row(entry.activation, entry.format, *cells, f"{entry.megabytes:.2f}", *marks)
    Console(width=130).print(table)


def write_latencies(found: Sequence[Latency], folder: Path, name: str) -> list[Path]:
    """Write latencies as `name.json` and, where there are scores, draw them as `name.png`, both or none.

    Raises:
        InputError: The folder cannot be written to; its files are then as they were.
    """
    contents = {folder / f"{name}.json": json.dumps([asdict(entry) for entry in found], indent=1).encode()}
    if all(entry.scores for entry in found):
        contents[folder / f"{name}.png"] = render_figure(draw_pareto(found), dpi=_DPI)
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically(contents)
    return list(contents)


def draw_pareto(found: Sequence[Latency]) -> Figure:
    """Draw score against latency: colours are activations, marks are formats, lines join those that nothing beats.

    A point is on the line of its format if no other is both faster and better.
    """
    activations, forms = list(dict.fromkeys(e.activation for e in found)), list(dict.fromkeys(e.format for e in found))
    score = list(found[0].scores or {})[-1]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, form in enumerate(forms):
        points = [(e.median, (e.scores or {})[score], e.activation) for e in found if e.format == form]
        for x, y, activation in points:
            colour = COLOURS[activations.index(activation) % len(COLOURS)]
            axes.plot(x, y, _MARKS[index % len(_MARKS)], color=colour, markersize=8)
        front = pareto_front([(x, y) for x, y, _ in points])
        axes.plot([x for x, _ in front], [y for _, y in front], color="grey", linewidth=0.8, zorder=0)
    for index, activation in enumerate(activations):
        axes.plot([], [], "s", color=COLOURS[index % len(COLOURS)], label=activation)
    for index, form in enumerate(forms):
        axes.plot([], [], _MARKS[index % len(_MARKS)], color="black", fillstyle="none", label=form)
    axes.set(xlabel="median latency of an image, ms", ylabel=score, xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (time, score) that no other one beats in both, fastest first.

    >>> pareto_front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.6)])
    [(1.0, 0.5), (3.0, 0.6)]
    """
    front: list[tuple[float, float]] = []
    for time, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((time, score))
    return front
