"""Measure dynamic convolution, forward and backward: the fused path against a loop over the images of the batch.

    python scripts/bench_conv.py [--output runs/bench] [--turns 15] [--device cpu]

Layers of MobileNetV2 and rtdetr-n, and the whole MobileNetV2, at batch 8 and with K = 4, all forms in turns. Beside the
loop stand other forms of the same result, and a static convolution of the whole batch, whose work is a part of every
form: the loop in units of it is the most that any form could gain. Prints tables, writes conv.json. Five minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_ops import keep_freed_memory
from dynamic_forms import BATCH, KERNELS, LAYERS, bench_layer, loop
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from rtdetr_act import DynamicConv2d, patch_convs
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

SIDES = (224, 96, 32)


class Looped(DynamicConv2d):
    """A dynamic convolution that loops over the images."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the fused one returns."""
        pi = self.attention(x)
        return loop(x, pi, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def bench_network(side: int, turns: int, device: str) -> dict[str, Ratio]:
    """Return the time of a step of MobileNetV2, in units of the fused path."""
    stock = mobilenet_v2().to(device)
    fused = deepcopy(stock)
    patch_convs(fused, kernels=KERNELS)
    looping = deepcopy(fused)
    for module in looping.modules():
        if isinstance(module, DynamicConv2d):
            module.__class__ = Looped
    images, labels = torch.randn(BATCH, 3, side, side, device=device), torch.arange(BATCH, device=device)

    def step(net: nn.Module) -> Callable[[], None]:
        def call() -> None:
            net.zero_grad()
            F.cross_entropy(net(images), labels).backward()

        return call

    return compute_ratios(
        time_medians(
            {name: step(net) for name, net in (("fused", fused), ("loop", looping), ("static", stock))},
            turns,
            device=device,
        ),
        "fused",
    )


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("runs/bench"),
    turns: Annotated[int, typer.Option(min=2, help="Turns that count, per layer.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print, write."""
    keep_freed_memory()
    torch.manual_seed(0)
    found: dict[str, dict[str, Ratio]] = {}
    for layer in LAYERS:
        network, inside, outside, side, stride, groups, size = layer
        kind = "depthwise" if groups > 1 else f"to {outside}"
        title = f"{network}: {inside} {kind}, {side}x{side}{', stride 2' if stride > 1 else ''}, map {size}x{size}"
        found[title] = bench_layer(layer, turns, device)
    for side in SIDES:
        found[f"MobileNetV2 at {side}, whole"] = bench_network(side, max(turns // 2, 5), device)
    columns = ["fused", "loop", "static", *dict.fromkeys(name for row in found.values() for name in row)]
    columns = list(dict.fromkeys(columns))
    head = f"batch {BATCH}, K = {KERNELS}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(
        title=f"Forward and backward, {head}: in units of the fused path, median of paired ratios (quartiles)"
    )
    table.add_column("layer", overflow="fold")
    for name in (*columns, "loop / static"):
        table.add_column(name, justify="right")
    for title, row in found.items():
        cells = [f"{row['fused'].seconds * 1e3:.1f} ms", *(str(row[n]) if n in row else "-" for n in columns[1:])]
        table.add_row(title, *cells, f"{row['loop'].median / row['static'].median:.2f}")
    Console(width=170).print(table)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "conv.json"
    data = {title: {name: asdict(ratio) for name, ratio in row.items()} for title, row in found.items()}
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print(f"file: {path}")


if __name__ == "__main__":
    typer.run(main)
