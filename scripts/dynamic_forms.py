"""Dynamic convolution in the forms that the benchmarks compare, and the layers that they compare them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rtdetr_act.activations.dynamic_conv import _grouped_conv, dynamic_conv, dynamic_conv_parallel, mix
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

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
    return _grouped_conv(x, mix(pi, weight), None if bias is None else mix(pi, bias), *where)


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
    forms["K convolutions"] = dynamic_conv_parallel
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

    return compute_ratios(
        time_medians({name: step(form) for name, form in forms.items()}, turns, repeat=3, device=device), "fused"
    )
