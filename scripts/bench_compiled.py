"""Measure a training step of activations in a model with and without `torch.compile`, against the stock model without.

    python scripts/bench_compiled.py [--output runs/bench] [--turns 8] [--device cpu] [--acts arelu,dyrelu_b,dyrelu_c]

As under Ultralytics' `compile=True`: the model is compiled, the loss is not. Prints a table and writes compiled.csv.
About fifteen minutes on two cores, nearly all of it the compiler's.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rtdetr_act.integrations.ultralytics.costs import draw_batch, make_training_step, prepare_training
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant
from rtdetr_act.timing import compute_ratios, time_medians

HEADER = ("activation", "without", "compiled")


def make_compiled_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return a training step of a model that the first call compiles."""
    compiled = torch.compile(model, dynamic=False)

    def step() -> None:
        loss = model.loss(batch, compiled(batch["img"]))[0]  # type: ignore[operator]
        loss.sum().backward()
        model.zero_grad()

    return step


def main(
    output: Annotated[Path, typer.Option(help="Folder for the CSV file.")] = Path("runs/bench"),
    turns: Annotated[int, typer.Option(min=2, help="Training steps that count, per variant.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    acts: Annotated[str, typer.Option(help="Activations, at most seven.")] = "arelu,dyrelu_b,dyrelu_c",
    model: Annotated[str, typer.Option(help="Model YAML.")] = "yolo11n.yaml",
    imgsz: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 8,
) -> None:
    """Measure, print, write."""
    torch.manual_seed(0)
    names = [STOCK, *acts.split(",")]
    steps: dict[str, Callable[[], None]] = {}
    for name in names:
        loaded = load_variant(model, name)[1]
        network = prepare_training(loaded.model, device)
        images = draw_batch(network, loaded.task, imgsz, batch, device)
        steps[name] = make_training_step(network, images)
        steps[f"{name}, compiled"] = make_compiled_step(network, images)
    ratios = compute_ratios(time_medians(steps, turns, device=device), STOCK)
    rows = [(name, str(ratios[name]), str(ratios[f"{name}, compiled"])) for name in names]
    size = f"{model}, {imgsz} pixels, batch {batch}, {device}, {torch.get_num_threads()} threads, torch"
    table = Table(title=f"{size} {torch.__version__}: a training step of {ratios[STOCK].seconds * 1e3:.0f} ms")
    for column in HEADER:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "compiled.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    print(f"file: {output / 'compiled.csv'}")


if __name__ == "__main__":
    typer.run(main)
