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
from typing import Annotated, Any

import torch
import typer
from bench_ops import keep_freed_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from rtdetr_act import DynamicConv2d, patch_convs
from rtdetr_act.bench import Ratio, ratios, take_turns
from rtdetr_act.ops.dynamic_conv import _as_one_convolution, dynamic_conv, in_parallel, mix

BATCH, KERNELS = 8, 4
# Network, channels in and out, side of the kernel, stride, groups, side of the map.
LAYERS = (
    ("MobileNetV2 at 224", 32, 32, 3, 1, 32, 112),
    ("MobileNetV2 at 224", 16, 96, 1, 1, 1, 112),
    ("MobileNetV2 at 224", 96, 96, 3, 2, 96, 112),
    ("MobileNetV2 at 224", 144, 24, 1, 1, 1, 56),
    ("MobileNetV2 at 224", 64, 384, 1, 1, 1, 14),
    ("MobileNetV2 at 224", 576, 576, 3, 2, 576, 14),
    ("MobileNetV2 at 224", 960, 160, 1, 1, 1, 7),
    ("MobileNetV2 at 224", 320, 1280, 1, 1, 1, 7),
    ("MobileNetV2 at 96", 160, 960, 1, 1, 1, 3),
    ("MobileNetV2 at 32", 320, 1280, 1, 1, 1, 1),
    ("rtdetr-n at 128", 16, 16, 3, 1, 1, 32),
    ("rtdetr-n at 128", 64, 64, 3, 1, 1, 16),
    ("rtdetr-n at 128", 128, 128, 3, 2, 1, 8),
    ("rtdetr-n at 128", 128, 128, 1, 1, 1, 4),
)
SIDES = (224, 96, 32)


def loop(x: Tensor, pi: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """Compute the formula an image at a time, as it is written."""
    results = []
    for i in range(len(x)):
        kernel = (pi[i].view(-1, 1, 1, 1, 1) * weight).sum(0)
        b = None if bias is None else pi[i] @ bias
        results.append(F.conv2d(x[i : i + 1], kernel, b, *where))
    return torch.cat(results)


def grouped(x: Tensor, pi: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """Take the grouped convolution, 1x1 kernels or not."""
    return _as_one_convolution(x, mix(pi, weight), None if bias is None else mix(pi, bias), *where)


def unfolded(x: Tensor, pi: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """Take the windows apart, and multiply matrices: without groups only."""
    stride, padding, dilation, _ = where
    windows = F.unfold(x, weight.shape[3:], dilation, padding, stride)
    y = torch.bmm(mix(pi, weight).flatten(2), windows)
    y = y if bias is None else y + mix(pi, bias)[:, :, None]
    side = (x.shape[2] + 2 * padding - dilation * (weight.shape[3] - 1) - 1) // stride + 1
    return y.unflatten(2, (side, -1))


def static(x: Tensor, pi: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """Give all images the first kernel."""
    return F.conv2d(x, weight[0], None if bias is None else bias[0], *where)


class Looped(DynamicConv2d):
    """A dynamic convolution that loops over the images."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the fused one returns."""
        pi = self.attention(x)
        return loop(x, pi, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def bench_layer(layer: tuple[Any, ...], turns: int, device: str) -> dict[str, Ratio]:
    """Return the time of each form for one layer, in units of the fused path."""
    _, inside, outside, side, stride, groups, size = layer
    leaves = [
        torch.randn(shape, device=device)
        for shape in ((BATCH, inside, size, size), (BATCH, KERNELS), (KERNELS, outside, inside // groups, side, side))
    ]
    leaves[1] = leaves[1].softmax(1)
    leaves = [t.requires_grad_() for t in leaves]
    forms: dict[str, Callable[..., Tensor]] = {"fused": dynamic_conv, "loop": loop, "static": static}
    forms.update({"grouped": grouped} if side == 1 else {})
    forms.update({"unfolded": unfolded} if groups == 1 and side > 1 else {})
    forms["K convolutions"] = in_parallel
    where = stride, side // 2, 1, groups
    expected = loop(*leaves, None, *where)
    for name, form in forms.items():
        if name != "static" and not torch.allclose(form(*leaves, None, *where), expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{name} computes something else in {layer}")
    direction = torch.randn_like(expected)

    def step(form: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            form(*leaves, None, *where).backward(direction)

        return call

    return ratios(take_turns({name: step(form) for name, form in forms.items()}, turns, repeat=3), "fused")


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

    return ratios(
        take_turns({name: step(net) for name, net in (("fused", fused), ("loop", looping), ("static", stock))}, turns),
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
    table = Table(title=f"Forward and backward, {head}: in units of the fused path, median (quartiles)")
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
