"""What is known of models from outside: sites counted in Ultralytics' code, and a block that shares its activation."""

from __future__ import annotations

import torch
from torch import nn
from ultralytics import __version__
from ultralytics.nn.modules import Detect

# In 8.3.10 and older, the heads of these have two convolutions more at each of their three levels.
MORE = 0 if hasattr(Detect, "legacy") else 6
# From 8.4.0 to 8.4.140, the first convolution of SPPF has no activation, as YOLO26 wants it, in these older models too.
FEWER = int((8, 4, 0) <= tuple(map(int, __version__.split(".")[:3])) <= (8, 4, 140))

# model -> activation sites on maps, all sites
SITES = {
    "rtdetr-l": (77, 92),
    "rtdetr-x": (109, 124),
    "rtdetr-resnet50": (73, 88),
    "yolov6n": (53 + MORE - FEWER, 53 + MORE - FEWER),
    "yolov8n": (57 + MORE - FEWER, 57 + MORE - FEWER),
    "yolov9t": (179 + MORE, 179 + MORE),
    "yolov10n": (87 - FEWER, 87 - FEWER),
    "yolo11n": (77 - FEWER, 77 - FEWER),
    "yolo12n": (81, 81),
    "yolo26n": (105, 105),
}

# model -> what its activation sites on maps hold
HELD = {
    "rtdetr-l": {"relu": 53, "silu": 24},  # HGNetv2's ReLUs; the SiLUs of 12 Conv and 12 RepConv
    "yolo11n": {"silu": SITES["yolo11n"][0]},
}


class Twice(nn.Module):
    """Calls one ReLU at two widths, by the same line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.a, self.b):
            x = self.relu(conv(x))
        return x
