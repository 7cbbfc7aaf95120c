"""Measure what `memory="low"` saves, what it costs in time, and how far gradients move.

    python scripts/bench_memory.py [--output runs/bench] [--turns 5] [--device cpu]

Every activation with and without it: bytes kept for the backward and peak memory of a training step, in units of the
model with SiLU at all sites; and the time of the step in units of the same model without it, in turns. Then gradients
against those of a pass that keeps everything, in float32 and under autocast, with the gammas of all BatchNorms as they
are and scaled down. Prints tables, writes memory.json and memory.csv. About 25 minutes on two cores.
"""

from __future__ import annotations

import csv
import gc
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_ops import keep_freed_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rtdetr_act.files import write_files_atomically
from rtdetr_act.integrations.ultralytics.costs import draw_batch, make_training_step, measure_memory, prepare_training
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.timing import compute_ratios, time_medians

LOW = "memory=low"
ACTIVATIONS = ("silu", "mish", "gelu", "hardswish", "relu", "leaky_relu", "prelu", "arelu", "aconc", "dyrelu_b")
# Model, side of the images, batch.
RUNS = (("rtdetr-l.yaml", 640, 1), ("rtdetr-l.yaml", 320, 2), ("yolo11n.yaml", 640, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAMMAS = (1.0, 1e-2, 1e-4)


@dataclass(frozen=True)
class Row:
    """One activation in one model.

    Attributes:
        model: Name of the model.
        imgsz: Side of the images, in pixels.
        batch: Images of a step.
        activation: The activation at all sites.
        kept: Bytes kept for the backward, without memory="low".
        kept_low: The same with it.
        peak: Peak of a training step in bytes, parameters not counted, without it.
        peak_low: The same with it.
        time: Time of a step with it, in units of one without: median of paired ratios.
        time_from: First quartile.
        time_to: Third quartile.
    """

    model: str
    imgsz: int
    batch: int
    activation: str
    kept: int
    kept_low: int
    peak: int
    peak_low: int
    time: float
    time_from: float
    time_to: float


def bench_activation(source: str, imgsz: int, batch: int, activation: str, turns: int, device: str) -> Row:
    """Measure one activation in one model."""
    steps, memory = {}, {}
    for name in (activation, f"{activation} {LOW}"):
        model, drawn = _prepare(source, name, imgsz, batch, device)
        memory[name], steps[name] = measure_memory(model, drawn, device), make_training_step(model, drawn)
    ratio = compute_ratios(time_medians(steps, turns, warmup=1, device=device), activation)[f"{activation} {LOW}"]
    without, low = memory.values()
    name = Path(source).stem
    times = ratio.median, ratio.low, ratio.high
    return Row(name, imgsz, batch, activation, without.kept, low.kept, without.peak, low.peak, *times)


def _prepare(source: str, activation: str, imgsz: int, batch: int, device: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a task model in training mode, the same for the same activation, and a batch for it."""
    torch.manual_seed(0)
    _, model = load_variant(source, activation)
    module = prepare_training(model.model, device)
    return module, draw_batch(module, str(model.task), imgsz, batch, device)


def compare_gradients(source: str, activation: str, device: str) -> Iterator[tuple[str, float, float, float]]:
    """Compare gradients with those of a pass that keeps everything.

    Yields:
        The dtype; the gamma of every second channel of all BatchNorms; and the distance of the gradients of those
        gammas, and of all parameters, in units of their norm.
    """
    for dtype in DTYPES:
        for gamma in GAMMAS:
            found = [
                _compute_gradients(source, name, dtype, gamma, device) for name in (activation, f"{activation} {LOW}")
            ]
            small = [[grads[name][::2] for name in grads if name.endswith("bn.weight")] for grads in found]
            every = [list(grads.values()) for grads in found]
            yield str(dtype).removeprefix("torch."), gamma, _measure_distance(*small), _measure_distance(*every)


def _compute_gradients(source: str, plan: str, dtype: torch.dtype, gamma: float, device: str) -> dict[str, Tensor]:
    """Return the gradients of a sum of squares of all results, by the names of the parameters."""
    model, drawn = _prepare(source, plan, 320, 2, device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight[::2], gamma)
            nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(0))
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        predicted = model.predict(drawn["img"])
    _sum_squares(predicted).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def _measure_distance(kept: list[Tensor], computed: list[Tensor]) -> float:
    distance = sum(float((a - b).square().sum()) for a, b in zip(kept, computed, strict=True))
    return (distance / sum(float(each.square().sum()) for each in kept)) ** 0.5


def _sum_squares(value: Any) -> Tensor:
    """Return the sum over all tensors in a result of the means of their squares."""
    if isinstance(value, Tensor):
        return value.float().square().mean()
    parts = value.values() if isinstance(value, dict) else value
    total: Tensor = sum(map(_sum_squares, parts), torch.zeros(()))
    return total


COLUMNS = ("activation", "kept", "kept, low", "peak", "peak, low", "step, low / normal")


def tabulate(rows: list[Row]) -> list[list[str]]:
    """Return the rows of one model as text, memory in units of the first."""
    base, table = rows[0], []
    for row in rows:
        sizes = row.kept / base.kept, row.kept_low / base.kept, row.peak / base.peak, row.peak_low / base.peak
        time = f"{row.time:.2f} ({row.time_from:.2f}-{row.time_to:.2f})"
        table.append([row.activation, *(f"{size:.2f}" for size in sizes), time])
    return table


def print_rows(title: str, rows: list[Row]) -> None:
    """Print the rows of one model, in units of SiLU."""
    table = Table(title=f"{title}: memory in units of SiLU's")
    for column in COLUMNS:
        table.add_column(column, justify="right" if table.columns else "left")
    for cells in tabulate(rows):
        table.add_row(*cells)
    Console(width=110).print(table)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the CSV.")] = Path("runs/bench"),
    turns: Annotated[int, typer.Option(min=2, help="Training steps that count, per variant.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print, write."""
    keep_freed_memory()
    rows: dict[str, list[Row]] = {}
    for source, imgsz, batch in RUNS:
        title = f"{Path(source).stem}, {imgsz} pixels, batch {batch}"
        rows[title] = []
        for activation in ACTIVATIONS:
            rows[title].append(bench_activation(source, imgsz, batch, activation, turns, device))
            gc.collect()
        print_rows(title, rows[title])
    gradients = {name: list(compare_gradients("yolo11n.yaml", name, device)) for name in ("silu", "arelu")}
    for name, distances in gradients.items():
        for dtype, gamma, small, every in distances:
            print(f"yolo11n, {name}, {dtype}, gamma {gamma:g}: gradients of gammas {small:.1e} off, all {every:.1e}")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["model", *COLUMNS])
    for title, found in rows.items():
        writer.writerows([title if number == 0 else "", *cells] for number, cells in enumerate(tabulate(found)))
    data = {"rows": [asdict(row) for found in rows.values() for row in found], "gradients": gradients}
    texts = {"memory.json": json.dumps(data, indent=1), "memory.csv": table.getvalue()}
    contents = {output / name: text.encode() for name, text in texts.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_files_atomically(contents)
    for path in contents:
        print(f"file: {path}")


if __name__ == "__main__":
    typer.run(main)
