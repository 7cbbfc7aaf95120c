"""Fold AReLU in whole models: does the network stay the same, what is left in its graph, and what does that gain?

    python scripts/bench_fold.py [--imgsz 320] [--turns 60] [--output runs/bench]

Each model gets random BatchNorm statistics and random AReLU parameters, some of them outside the clamp, at all its
sites. Then: the largest difference of the outputs before and after folding, in float32 and in units of the largest
output; the operators of the ONNX graph against those of the same model built with leaky_relu; and the latency in ONNX
Runtime of the folded and of the unfolded model, in units of the one with leaky_relu, all in turns. Ten minutes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from rtdetr_act import fold_activations, patch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.integrations.ultralytics.export import export_model
from rtdetr_act.integrations.ultralytics.latency import load_runner
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.surgery.scales import flatten_tensors
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

MODELS = ("rtdetr-l.yaml", "rtdetr-resnet50.yaml", "yolo11n.yaml", "yolov9t.yaml", "yolov10n.yaml")
COUNTED = ("LeakyRelu", "Mul", "Where", "PRelu")


def main(
    output: Annotated[Path, typer.Option(help="Folder for exported files and the JSON.")] = Path("runs/bench"),
    imgsz: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 320,
    turns: Annotated[int, typer.Option(min=2, help="Measurements that count, per model.")] = 60,
    model: Annotated[list[str] | None, typer.Option(help="Models; those of the table if none.")] = None,
) -> None:
    """Fold, compare, measure, print."""
    LOGGER.setLevel(logging.ERROR)
    table = Table(
        title=f"AReLU folded, {imgsz} pixels, {torch.get_num_threads()} threads; latency in units of leaky_relu",
        caption="latency: median of paired ratios, one per round (quartiles)",
    )
    for column in ("model", "sites", "left", "difference", *COUNTED, "folded", "unfolded"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for source in model or MODELS:
        row = _judge(source, output / "fold" / Path(source).stem, imgsz, turns)
        rows.append(row)
        counts = [f"{row['folded'][name]} / {row['leaky_relu'][name]}" for name in COUNTED]
        times = [str(Ratio(**row["times"][name])) for name in ("folded", "unfolded")]
        table.add_row(
            Path(source).stem, str(row["sites"]), str(row["left"]), f"{row['difference']:.0e}", *counts, *times
        )
    Console(width=150).print(table)
    (output / "fold.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _judge(source: str, folder: Path, imgsz: int, turns: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    unfolded, leaky = _unsettle(load_model(source), "arelu"), _unsettle(load_model(source), "leaky_relu(0.3)")
    folded = deepcopy(unfolded)
    report = fold_activations(folded)
    images = torch.rand(2, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(1))
    files, graphs = {}, {}
    for name, each in {"leaky_relu": leaky, "folded": folded, "unfolded": unfolded}.items():
        each.model.pt_path = str(folder / f"{name}.pt")
        files[name] = export_model(each, "onnx", imgsz=imgsz, fold=False)
        counts = Counter(node.op_type for node in onnx.load(files[name]).graph.node)
        graphs[name] = {kind: counts[kind] for kind in COUNTED}
    times = time_medians({name: load_runner(path, imgsz) for name, path in files.items()}, turns, repeat=3)
    with torch.no_grad():
        difference = _difference(unfolded.model(images), folded.model(images))
    return {
        "model": source,
        "sites": len(report),
        "left": sum(isinstance(module, AReLU) for module in folded.model.modules()),
        "difference": difference,
        **graphs,
        "times": {name: asdict(ratio) for name, ratio in compute_ratios(times, "leaky_relu").items()},
    }


def _unsettle(model: Any, activation: str) -> Any:
    """Swap every activation, and draw its parameters and BatchNorm's statistics at random."""
    patch_model(model, activation, scope="all")
    random = torch.Generator().manual_seed(0)

    def draw(size: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=random)

    for module in model.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                draw(module.num_features, -0.2, 0.2),
                draw(module.num_features, 0.5, 1.5),
            )
            module.weight.data, module.bias.data = (
                draw(module.num_features, 0.5, 1.5),
                draw(module.num_features, -0.2, 0.2),
            )
        elif isinstance(module, AReLU):
            module.alpha.data, module.beta.data = draw(1, -0.5, 1.5), draw(1, -4, 4)
    model.model.eval()
    return model


def _difference(before: Any, after: Any) -> float:
    """Return the largest difference, in units of the largest value of an output.

    RT-DETR's decoder takes the best 300 positions of the encoder in the order of their scores; a rounding may swap two,
    so its queries, (box, scores) each, are compared with the nearest ones.
    """
    if len(before) == 2 and isinstance(before[1], tuple):
        return max(_unlike(one, other) for one, other in zip(_queries(before[1]), _queries(after[1]), strict=True))
    pairs = zip(flatten_tensors(before), flatten_tensors(after), strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)


def _queries(raw: tuple[Tensor, ...]) -> Tensor:
    """Return (images, queries, 4 + classes) from RT-DETR's raw outputs."""
    boxes, scores = raw[:2]
    return torch.cat([boxes, scores.sigmoid()], -1).flatten(0, -3)


def _unlike(one: Tensor, other: Tensor) -> float:
    distances = torch.cdist(one, other, p=float("inf"))
    return max(distances.min(dim).values.max().item() for dim in (0, 1))


if __name__ == "__main__":
    typer.run(main)
