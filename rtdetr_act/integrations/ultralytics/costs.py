"""Time and memory of an Ultralytics model with other activations against its stock form, all in one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from rtdetr_act.analysis.figures import COLOURS, render_figure, write_figure
from rtdetr_act.analysis.memory import measure_peak_bytes, measure_saved_bytes
from rtdetr_act.errors import InputError
from rtdetr_act.files import convert_write_errors, create_folder, write_files_atomically
from rtdetr_act.integrations.ultralytics.argument_ranges import move_to
from rtdetr_act.integrations.ultralytics.arguments import check_counts
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

# Ultralytics' losses read these of a batch; so many objects stand in each drawn image.
_OBJECTS = 8


_DPI = 110


@dataclass(frozen=True)
class Cost:
    """What one variant of a model costs, in units of the stock model.

    Attributes:
        activation: The plan, or "stock".
        train: One training step: forward, loss, backward.
        inference: One forward pass of the fused model.
        peak: Peak memory of a training step, weights left out.
        saved: Bytes that autograd keeps between forward and backward.
        peak_bytes: The former in bytes.
        saved_bytes: The former in bytes.
    """

    activation: str
    train: Ratio
    inference: Ratio
    peak: float
    saved: float
    peak_bytes: int
    saved_bytes: int


def bench_model(
    source: str,
    activations: Sequence[str],
    *,
    imgsz: int = 224,
    batch: int = 8,
    device: str = "cpu",
    turns: int = 15,
    scope: str = "conv",
) -> list[Cost]:
    """Compare variants of a model with its stock form; the weights are random, the images and objects too.

    Args:
        source: Model YAML or checkpoint.
        activations: Plans, as in `patch_model`.
        imgsz: Side of the images, in pixels.
        batch: Images of a training step; inference takes one.
        device: "cpu", "cuda" or "cuda:1".
        turns: Turns of the training step; inference takes twice as many, of six passes.
        scope: "conv" or "all".

    Returns:
        The stock model's cost first, then those of the variants.

    Raises:
        RtdetrActError: The model, a plan or the device is wrong.
    """
    models: dict[str, Any] = {}
    for name in (STOCK, *activations):
        _, loaded = load_variant(source, name, scope=scope)
        models[name] = _prepare(loaded.model, device)
    drawn = draw_batch(models["stock"], str(loaded.task), imgsz, batch, device)
    steps = {name: _training_step(model, drawn) for name, model in models.items()}
    train = compute_ratios(time_medians(steps, turns, device=device), "stock")
    peaks = {name: measure_peak_bytes(step, device) for name, step in steps.items()}
    saved = {name: measure_saved_bytes(lambda m=model: m.loss(drawn), model) for name, model in models.items()}  # type: ignore[misc]
    image = drawn["img"][:1]
    passes = {name: make_inference(model, image) for name, model in models.items()}
    inference = compute_ratios(time_medians(passes, 2 * turns, repeat=6, device=device), "stock")
    return [
        Cost(
            name,
            train[name],
            inference[name],
            peaks[name] / peaks["stock"],
            saved[name] / saved["stock"],
            peaks[name],
            saved[name],
        )
        for name in models
    ]


def _prepare(model: nn.Module, device: str) -> nn.Module:
    model = move_to(model, device).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    # What a trainer sets: the gains of the losses, and the number of classes.
    model.args, model.nc = get_cfg(), model.yaml["nc"]  # type: ignore[index]
    return model


def _training_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss = model.loss(batch)[0]  # type: ignore[operator]
        loss.sum().backward()
        model.zero_grad()

    return step


def time_training_step(model: Any, imgsz: int, batch: int, device: str = "cpu") -> float:
    """Return the seconds of a training step of an RTDETR or YOLO object on random images, without its optimizer.

    Raises:
        InputError: The device, imgsz or batch cannot be used, or the task is none of those that `draw_batch` knows.
    """
    prepared = _prepare(model.model, device)
    step = _training_step(prepared, draw_batch(prepared, str(model.task), imgsz, batch, device))
    return statistics.median(time_medians({"step": step}, 3, warmup=1, device=device)["step"])


def make_inference(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    """Return a call that runs a fused copy of a task model on images, (B, 3, H, W)."""
    fused = deepcopy(model).eval()
    fused.fuse(verbose=False)  # type: ignore[operator]

    def call() -> Any:
        with torch.inference_mode():
            return fused(image)

    return call


def draw_batch(model: nn.Module, task: str, imgsz: int, batch: int, device: str) -> dict[str, Tensor]:
    """Return random images and objects in the form of Ultralytics' data loaders, for any of its tasks.

    Raises:
        InputError: The task has another form of batch, or imgsz or batch is below 1.
    """
    check_counts(imgsz=imgsz, batch=batch)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, imgsz, imgsz, generator=random)
    count, classes = batch * _OBJECTS, int(model.nc)  # type: ignore[arg-type]
    labels = torch.randint(0, classes, (count, 1), generator=random).float()
    drawn = {"img": images, "cls": labels, "batch_idx": torch.arange(batch).repeat_interleave(_OBJECTS).float()}
    boxes = torch.rand(count, 4, generator=random) * 0.3 + 0.3
    if task == "classify":
        drawn = {"img": images, "cls": labels[:batch, 0].long()}
    elif task in ("detect", "segment", "pose"):
        drawn["bboxes"] = boxes
    elif task == "obb":
        drawn["bboxes"] = torch.cat([boxes, torch.rand(count, 1, generator=random)], 1)
    else:
        raise InputError(f"there is no benchmark for the task '{task}' yet: detect, segment, pose, obb or classify")
    if task == "segment":
        side = imgsz // 4
        drawn["masks"] = torch.randint(0, _OBJECTS + 1, (batch, side, side), generator=random).float()
        drawn["sem_masks"] = torch.randint(0, classes, (batch, side, side), generator=random)
    if task == "pose":
        drawn["keypoints"] = torch.rand(count, *model.yaml["kpt_shape"], generator=random)  # type: ignore[index]
    return {name: value.to(device) for name, value in drawn.items()}


def print_costs(title: str, costs: Sequence[Cost]) -> None:
    """Print costs as a table, ratios with the quartiles of their turns."""
    table = Table(title=f"{title}: in units of the stock model, median (quartiles) of the turns")
    table.add_column("activation", overflow="fold")
    for column in ("training step", "inference", "peak memory", "saved for backward"):
        table.add_column(column, justify="right")
    for cost in costs:
        if cost.activation == "stock":
            times = f"{cost.train.seconds * 1e3:.1f} ms", f"{cost.inference.seconds * 1e3:.2f} ms"
            memory = f"{cost.peak_bytes / 2**20:.1f} MiB", f"{cost.saved_bytes / 2**20:.1f} MiB"
        else:
            times, memory = (str(cost.train), str(cost.inference)), (f"{cost.peak:.2f}", f"{cost.saved:.2f}")
        table.add_row(cost.activation, *times, *memory)
    Console(width=110).print(table)


def write_costs(costs: Mapping[str, Sequence[Cost]], folder: Path, name: str) -> list[Path]:
    """Write costs by model as `name.json`, and draw them as `name.png`, both or none.

    Raises:
        InputError: The folder cannot be written; its files are then as they were.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for model, found in costs.items():
        for cost in found[1:]:  # the stock model is 1 everywhere
            times = {"training step": cost.train.median, "inference, batch 1": cost.inference.median}
            memory = {"peak memory": cost.peak, "saved for backward": cost.saved}
            panels.setdefault(model, {})[cost.activation] = {**times, **memory}
    text = json.dumps({model: [asdict(cost) for cost in found] for model, found in costs.items()}, indent=1)
    chart = bars_figure(panels, "in units of the stock model")
    contents = {folder / f"{name}.json": text.encode(), folder / f"{name}.png": render_figure(chart, dpi=_DPI)}
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically(contents)
    return list(contents)


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], output: Path | str, *, axis: str) -> Path:
    """Draw bars, a panel above the other, in each a group of bars for each row, and a line at 1.

    Args:
        panels: Values by title of the panel, row and name; names are told apart by colour.
        output: PNG, SVG or PDF file to write.
        axis: What the values are.

    Returns:
        The path written.

    Raises:
        InputError: The file cannot be written; the old one is then as it was.
    """
    return write_figure(bars_figure(panels, axis), Path(output), dpi=_DPI)


def bars_figure(panels: Mapping[str, Mapping[str, Mapping[str, float]]], axis: str) -> Figure:
    """Return the figure of `draw_bars`."""
    names = list(dict.fromkeys(name for rows in panels.values() for values in rows.values() for name in values))
    heights = [len(rows) for rows in panels.values()]
    size = 9, 1.3 + 0.7 * len(panels) + 0.17 * sum(heights) * len(names)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)
    thick = 0.8 / len(names)
    for axes, (title, rows) in zip(grid[:, 0], panels.items(), strict=True):
        for index, name in enumerate(names):
            there = [(row, values[name]) for row, values in enumerate(rows.values()) if name in values]
            places = [row + (index - (len(names) - 1) / 2) * thick for row, _ in there]
            label = name if axes is grid[0, 0] else None
            colour = COLOURS[index % len(COLOURS)]
            bars = axes.barh(places, [value for _, value in there], thick, label=label, color=colour)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
    grid[-1, 0].set_xlabel(axis)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=len(names))
    return figure
