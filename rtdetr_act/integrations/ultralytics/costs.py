"""Measure time and memory of Ultralytics models with other activations against the stock one, all in one run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from rtdetr_act.analysis.figures import COLOURS, TWO_COLUMNS, figure_style, render_figure, write_figure
from rtdetr_act.analysis.memory import (
    BatchEstimate,
    StepMemory,
    count_state_bytes,
    estimate_batch,
    measure_step_memory,
)
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import convert_write_errors, create_folder, write_files_atomically
from rtdetr_act.integrations.ultralytics.arguments import check_positive_integers, move_to
from rtdetr_act.results import Result, to_plain
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

_OBJECTS_PER_IMAGE = 8


@dataclass(frozen=True, repr=False)
class Cost(Result):
    """Time and memory of one variant of a model, relative to the first variant measured.

    Attributes:
        activation: Name of the variant: its plan, or "stock".
        train: Time of a training step: forward, loss and backward. Ratios are paired within each round.
        inference: Time of a forward pass of the fused model on one image.
        peak: Peak memory of a training step, parameters not counted, as a ratio.
        saved: Memory kept between forward and backward, as a ratio.
        peak_bytes: Peak memory in bytes.
        saved_bytes: Memory kept for backward in bytes.
        saved_by_operator: `saved_bytes` by ATen operator, such as "convolution", the largest first.
        saved_by_layer: `saved_bytes` by layer, such as "model.9 (AIFI)", the largest first.
        largest_batch: Estimate of the largest batch that fits a device; None where it was not asked for.
    """

    activation: str
    train: Ratio
    inference: Ratio
    peak: float
    saved: float
    peak_bytes: int
    saved_bytes: int
    saved_by_operator: Mapping[str, int] = field(default_factory=dict)
    saved_by_layer: Mapping[str, int] = field(default_factory=dict)
    largest_batch: BatchEstimate | None = None

    def _summarise(self) -> str:
        """Return the activation and its ratios."""
        times = f"training step {self.train.median:.2f}, inference {self.inference.median:.2f}"
        return f"{self.activation}, {times}, peak memory {self.peak:.2f}, saved for backward {self.saved:.2f}"


def compare_costs(
    models: Mapping[str, Any],
    *,
    imgsz: int = 224,
    batch: int = 8,
    device: str = "cpu",
    rounds: int = 15,
    fits: float | None = None,
) -> list[Cost]:
    """Compare variants of a model on random images and objects.

    The variants are measured in interleaved rounds, so that a machine that slows down slows all of them alike.

    Args:
        models: RTDETR or YOLO objects of one task by name, the reference first. They are moved to the device, and stay
            in training mode.
        imgsz: Side of the images, in pixels.
        batch: Images of a training step; inference takes one.
        device: "cpu", "cuda" or "cuda:1".
        rounds: Rounds of the training step; inference takes twice as many, of six passes each.
        fits: Memory of a device in GiB, for which the largest batch is estimated. Default: None, no estimate.

    Returns:
        The costs, in the order of `models`.

    Raises:
        InputError: The device, imgsz, batch or fits cannot be used, or the task has no benchmark.
    """
    if fits is not None:
        _check_gib(fits)
    reference = next(iter(models))
    modules = {name: prepare_training(model.model, device) for name, model in models.items()}
    drawn = draw_batch(modules[reference], str(models[reference].task), imgsz, batch, device)
    steps = {name: make_training_step(module, drawn) for name, module in modules.items()}
    train = compute_ratios(time_medians(steps, rounds, device=device), reference)
    memory = {name: measure_memory(module, drawn, device) for name, module in modules.items()}
    largest: dict[str, BatchEstimate | None] = dict.fromkeys(models)
    if fits is not None:
        task = str(models[reference].task)
        largest |= {name: _estimate_batch(each, task, imgsz, batch, device, fits) for name, each in modules.items()}
    image = drawn["img"][:1]
    passes = {name: make_inference(module, image) for name, module in modules.items()}
    inference = compute_ratios(time_medians(passes, 2 * rounds, repeat=6, device=device), reference)
    return [
        Cost(
            activation=name,
            train=train[name],
            inference=inference[name],
            peak=memory[name].peak / memory[reference].peak,
            saved=memory[name].kept / memory[reference].kept,
            peak_bytes=memory[name].peak,
            saved_bytes=memory[name].kept,
            saved_by_operator=memory[name].by_operator,
            saved_by_layer=memory[name].by_layer,
            largest_batch=largest[name],
        )
        for name in models
    ]


def prepare_training(model: nn.Module, device: str) -> nn.Module:
    """Move a task model to a device, and prepare it for `model.loss` as a trainer does.

    Raises:
        InputError: The device cannot be used.
    """
    model = move_to(model, device).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    # Attributes that a trainer sets: the weights of the losses, and the number of classes.
    model.args, model.nc = get_cfg(), model.yaml["nc"]  # type: ignore[index]
    return model


def make_training_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return a function that runs forward, loss and backward of a prepared task model, and drops the gradients."""

    def step() -> None:
        loss = model.loss(batch)[0]  # type: ignore[operator]
        loss.sum().backward()
        model.zero_grad()

    return step


def _check_gib(fits: object) -> None:
    """Check the memory of a device, in GiB.

    Raises:
        InputError: It is not a positive finite number.
    """
    if not isinstance(fits, (int, float)) or isinstance(fits, bool) or not 0 < fits < math.inf:
        raise InputError(f"fits must be the memory of a device in GiB, such as 24, not {quote(fits)}")


def measure_memory(model: nn.Module, batch: Mapping[str, Tensor], device: str) -> StepMemory:
    """Measure the memory of a training step of a prepared task model; see `measure_step_memory`."""
    memory = measure_step_memory(lambda: model.loss(batch)[0], model, device)  # type: ignore[operator]
    model.zero_grad()
    return memory


def _estimate_batch(model: nn.Module, task: str, imgsz: int, batch: int, device: str, gib: float) -> BatchEstimate:
    """Estimate the largest batch from the peaks of two steps, with about `batch` images and with half of them.

    These are at least four and two, since BatchNorm does not train on one image whose map is one pixel. The gradients
    are there before each step, as when Ultralytics accumulates those of several batches.

    The peak is affine in the batch. Drawn through the peaks at 2 and 4 images of 224 pixels on a CPU, the line meets
    those at 8, 16 and 32 within 0.01% for yolo11n (225.5, 450.8 and 901.6 MiB), within 0.4% with `dyrelu_b`, which
    computes small maps in another way, and that of rtdetr-l at 8 (2165 MiB) within 0.01%. With `memory=low`, which
    keeps small maps, a line through the peaks at 4 and 8 images lies 3.4% below that at 64 (711 MiB); at 640 pixels,
    that through 2 and 4 meets the peak at 8 (734 MiB) within 0.01%.
    """
    half = max(2, batch // 2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    peaks = {}
    for images in (half, 2 * half):
        drawn = draw_batch(model, task, imgsz, images, device)
        memory = measure_step_memory(lambda d=drawn: model.loss(d)[0], device=device)  # type: ignore[misc, operator]
        peaks[images] = memory.peak + sum(t.nbytes for t in drawn.values())
    model.zero_grad()
    return estimate_batch(peaks, count_state_bytes(model), gib)


def time_training_step(model: Any, imgsz: int, batch: int, device: str = "cpu") -> float:
    """Return the time of a training step on random images, in seconds: forward, loss and backward, no optimizer step.

    Args:
        model: RTDETR or YOLO object. It is moved to the device, and stays in training mode.
        imgsz: Side of the images, in pixels.
        batch: Images of the step.
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        InputError: The device, imgsz or batch cannot be used, or the task has no benchmark.
    """
    module = prepare_training(model.model, device)
    step = make_training_step(module, draw_batch(module, str(model.task), imgsz, batch, device))
    return statistics.median(time_medians({"step": step}, 3, warmup=1, device=device)["step"])


def make_inference(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    """Return a function that runs a fused copy of a task model in evaluation mode on images (B, 3, H, W)."""
    fused = deepcopy(model).eval()
    fused.fuse(verbose=False)  # type: ignore[operator]

    def call() -> Any:
        with torch.inference_mode():
            return fused(image)

    return call


def draw_batch(model: nn.Module, task: str, imgsz: int, batch: int, device: str) -> dict[str, Tensor]:
    """Return a batch of random images and objects, as Ultralytics' data loaders make them.

    Args:
        model: Task model, whose number of classes and of keypoints the labels fit.
        task: "detect", "segment", "pose", "obb" or "classify".
        imgsz: Side of the images, in pixels.
        batch: Number of images.
        device: Device of the tensors.

    Returns:
        Images under "img", float (B, 3, imgsz, imgsz) in [0, 1), and the labels of eight objects per image; those of a
        classification task are one class per image.

    Raises:
        InputError: The task is another one, or imgsz or batch is not a positive integer.
    """
    check_positive_integers(imgsz=imgsz, batch=batch)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, imgsz, imgsz, generator=random)
    count, classes = batch * _OBJECTS_PER_IMAGE, int(model.nc)  # type: ignore[arg-type]
    labels = torch.randint(0, classes, (count, 1), generator=random).float()
    drawn = {
        "img": images,
        "cls": labels,
        "batch_idx": torch.arange(batch).repeat_interleave(_OBJECTS_PER_IMAGE).float(),
    }
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
        drawn["masks"] = torch.randint(0, _OBJECTS_PER_IMAGE + 1, (batch, side, side), generator=random).float()
        drawn["sem_masks"] = torch.randint(0, classes, (batch, side, side), generator=random)
    if task == "pose":
        drawn["keypoints"] = torch.rand(count, *model.yaml["kpt_shape"], generator=random)  # type: ignore[index]
    return {name: value.to(device) for name, value in drawn.items()}


def write_costs(costs: Mapping[str, Sequence[Cost]], folder: Path, name: str) -> list[Path]:
    """Write costs as `<name>.json` and draw them as `<name>.png`, both files or neither.

    Args:
        costs: Costs by title of the model, the reference first.
        folder: Folder of the files, which is made if need be.
        name: Name of the files.

    Returns:
        The paths written.

    Raises:
        InputError: The folder cannot be written to; its files are then as they were.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for model, found in costs.items():
        for cost in found[1:]:  # the ratios of the reference are 1
            times = {"training step": cost.train.median, "inference, batch 1": cost.inference.median}
            memory = {"peak memory": cost.peak, "saved for backward": cost.saved}
            panels.setdefault(model, {})[cost.activation] = {**times, **memory}
    text = json.dumps(to_plain(costs), indent=1)
    chart = bars_figure(panels, "in units of the stock model (times: medians of paired ratios)")
    contents = {folder / f"{name}.json": text.encode(), folder / f"{name}.png": render_figure(chart)}
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically(contents)
    return list(contents)


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], output: Path | str, *, axis: str) -> Path:
    """Draw panels of horizontal bars, a group of bars per row, with a line at 1.

    Args:
        panels: Values by title of the panel, row and name; each name has a colour.
        output: PNG, SVG or PDF file to write.
        axis: Label of the horizontal axis.

    Returns:
        The path written.

    Raises:
        InputError: The file cannot be written; an old one is then as it was.
    """
    return write_figure(bars_figure(panels, axis), Path(output))


@figure_style()
def bars_figure(panels: Mapping[str, Mapping[str, Mapping[str, float]]], axis: str) -> Figure:
    """Return the figure that `draw_bars` writes."""
    names = list(dict.fromkeys(name for rows in panels.values() for values in rows.values() for name in values))
    heights = [len(rows) for rows in panels.values()]
    size = TWO_COLUMNS, 1.0 + 0.6 * len(panels) + 0.17 * sum(heights) * len(names)
    figure = Figure(figsize=size)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)
    thickness = 0.8 / len(names)
    for axes, (title, rows) in zip(grid[:, 0], panels.items(), strict=True):
        for index, name in enumerate(names):
            bars = [(row, values[name]) for row, values in enumerate(rows.values()) if name in values]
            positions = [row + (index - (len(names) - 1) / 2) * thickness for row, _ in bars]
            label = name if axes is grid[0, 0] else None
            colour = COLOURS[index % len(COLOURS)]
            drawn = axes.barh(positions, [value for _, value in bars], thickness, label=label, color=colour)
            axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
    grid[-1, 0].set_xlabel(axis)
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure
