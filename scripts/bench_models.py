"""Measure activations inside models: time of a training step and of inference, peak memory, bytes kept for backward.

    python scripts/bench_models.py [--output runs/bench] [--turns 12] [--device cpu]

Each variant against the stock model, and against the forms of AReLU and DY-ReLU-B that people copy, in one run. Prints
tables, writes models.json and draws models.png. About eight minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from published import PublishedAReLU, PublishedDyReLUB

from rtdetr_act import register
from rtdetr_act.cli.bench import print_costs
from rtdetr_act.integrations.ultralytics.costs import Cost, compare_costs, write_costs
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variants

ACTIVATIONS = ["silu", "arelu", "prelu", "aconc", "frelu", "dyrelu_a", "dyrelu_b", "dyrelu_c"]
PUBLISHED = ["published_arelu", "published_dyrelu_b"]
# Model, activations, side of the images, batch.
RUNS = (
    ("rtdetr-n.yaml", [*ACTIVATIONS, *PUBLISHED], 224, 8),
    ("yolo11n.yaml", ["arelu", "dyrelu_b", *PUBLISHED], 224, 8),
    ("rtdetr-l.yaml", ["silu", "arelu", "dyrelu_b"], 224, 2),
)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the chart.")] = Path("runs/bench"),
    turns: Annotated[int, typer.Option(min=2, help="Training steps that count, per variant.")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print, write, draw."""
    register("published_arelu", PublishedAReLU)
    register("published_dyrelu_b", PublishedDyReLUB)
    costs: dict[str, list[Cost]] = {}
    for model, activations, imgsz, batch in RUNS:
        variants = load_variants(model, [STOCK, *activations])
        found = compare_costs(variants, imgsz=imgsz, batch=batch, device=device, rounds=turns)
        title = f"{Path(model).stem}, {imgsz} pixels, batch {batch}"
        print_costs(f"{title}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}", found)
        costs[title] = found
    by_name = {cost.activation: cost for cost in costs["rtdetr-l, 224 pixels, batch 2"]}
    share = by_name["arelu"].saved_bytes / by_name["silu"].saved_bytes
    print(f"rtdetr-l keeps {share:.3f} of the bytes for backward with arelu that it keeps with silu in its place")
    for path in write_costs(costs, output, "models"):
        print(f"file: {path}")


if __name__ == "__main__":
    typer.run(main)
