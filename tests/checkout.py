"""A checkout in the manner of YOLOv5 and YOLOv7: their layout and the names that they share, with code of our own."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

YAML = {
    "nc": 2,
    "anchors": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "backbone": [[-1, 1, "Conv", [8]], [-1, 1, "Conv", [8]]],
    "head": [[-1, 1, "Conv", [8]], [-1, 1, "nn.Conv2d", [6, 1]]],
}
SITES = 3

COMMON = """
from torch import nn

class Conv(nn.Module):
    {default}

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = {act}

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))
"""

YOLO = """
from copy import deepcopy
import yaml
from torch import nn
from models.common import Conv

class Model(nn.Module):
    def __init__(self, cfg="model.yaml", ch=3, nc=None, anchors=None):
        super().__init__()
        if isinstance(cfg, dict):
            self.yaml = cfg
        else:
            with open(cfg) as file:
                self.yaml = yaml.safe_load(file)
        ch = self.yaml["ch"] = self.yaml.get("ch", ch)
        self.model, self.save = parse_model(deepcopy(self.yaml), ch=[ch])

    def forward(self, x):
        return self.model(x)

def parse_model(d, ch):
    {evaluate}
    layers = []
    for i, (f, n, m, args) in enumerate(d["backbone"] + d["head"]):
        layer = eval(m)(ch[-1], *args)
        layer.i, layer.f, layer.np = i, f, sum(p.numel() for p in layer.parameters())
        layers.append(layer)
        ch.append(args[0])
    return nn.Sequential(*layers), []
"""

EVALUATE = 'if d.get("activation"):\n        Conv.default_act = eval(d["activation"])'

TRAIN = """
import argparse
import os
import signal
import sys
from copy import deepcopy
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from models.yolo import Model
from utils.torch_utils import ModelEMA

def train(opt):
    torch.manual_seed(0)
    ckpt = torch.load(opt.weights, weights_only=False) if opt.weights else None
    model = Model(opt.cfg or ckpt["model"].yaml, ch=3, nc=2)
    if ckpt:
        given, own = ckpt["model"].float().state_dict(), model.state_dict()
        given = {key: value for key, value in given.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(given, strict=False)
        print(f"Transferred {len(given)}/{len(own)} items")
    norms, weights, biases = [], [], []
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            biases.append(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module.weight)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            weights.append(module.weight)
    optimizer = torch.optim.SGD(norms, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": weights, "weight_decay": 0.05})
    optimizer.add_param_group({"params": biases})
    if opt.schedule:
        scheduler = LambdaLR(optimizer, lambda epoch: 1.0)
    ema, first = ModelEMA(model), 0
    wrapped, rank = model, int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    if opt.resume:
        optimizer.load_state_dict(ckpt["optimizer"])
        first = ckpt["epoch"] + 1
    if opt.schedule:
        scheduler.last_epoch = first - 1
    for epoch in range(first, opt.epochs):
        for _ in range(2):
            wrapped(torch.rand(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        if opt.schedule:
            scheduler.step()
        ckpt = {"epoch": epoch, "model": deepcopy(model).half(), "ema": deepcopy(ema.ema).half()}
        torch.save(ckpt | {"optimizer": optimizer.state_dict()}, opt.last.replace("RANK", str(rank)))
        print(f"epoch {epoch}", flush=True)
        if opt.interrupt == epoch:
            os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg", default="")
    parser.add_argument("--weights", default="")
    parser.add_argument("--last", default="last.pt")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--interrupt", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--schedule", type=int, default=1)
    train(parser.parse_args())
"""

AVERAGE = """
from copy import deepcopy

class ModelEMA:
    def __init__(self, model):
        self.ema = deepcopy(model).eval()

    def update(self, model):
        for mine, theirs in zip(self.ema.parameters(), model.parameters()):
            mine.data.lerp_(theirs.data, 0.5)
"""


def write_checkout(folder: Path, *, evaluates: bool) -> Path:
    """Write a checkout, and return its folder.

    Args:
        folder: The folder, which is made.
        evaluates: Whether it has `activation:` of a model YAML evaluated, as YOLOv5 does; YOLOv7 does not know it.
    """
    default, act = ("default_act = nn.SiLU()", "self.default_act") if evaluates else ("pass", "nn.LeakyReLU(0.1)")
    files = {
        "models/__init__.py": "",
        "models/common.py": COMMON.format(default=default, act=act),
        "models/yolo.py": YOLO.format(evaluate=EVALUATE if evaluates else "pass"),
        "utils/__init__.py": "",
        "utils/torch_utils.py": AVERAGE,
        "train.py": TRAIN,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_yaml(path: Path, activation: str | None = None, rows: Sequence[str | None] = ()) -> Path:
    """Write the model YAML, with an `activation:` and a fifth item for the first rows of the backbone where given."""
    backbone = [[*row, act] if act else row for row, act in zip(YAML["backbone"], [*rows, None, None], strict=False)]
    data = {**YAML, "backbone": backbone, **({"activation": activation} if activation else {})}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def write_script(checkout: Path, name: str, code: str) -> Path:
    """Write a script into a checkout, and return its path."""
    path = checkout / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code), encoding="utf-8")
    return path
