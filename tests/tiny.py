"""Models and data small enough to train for real in a test: about a second an epoch."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

# Every kind of layer of rtdetr-l.yaml, once.
RTDETR = {
    "nc": 2,
    "backbone": [
        [-1, 1, "HGStem", [4, 8]],
        [-1, 2, "HGBlock", [4, 8, 3]],
        [-1, 1, "DWConv", [8, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [8, 16, 3]],
        [-1, 1, "DWConv", [16, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [8, 24, 5, True, False]],
        [-1, 1, "DWConv", [24, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [8, 32, 5, True, False]],
    ],
    "head": [
        [-1, 1, "Conv", [16, 1, 1, None, 1, 1, False]],
        [-1, 1, "AIFI", [32, 2]],
        [-1, 1, "Conv", [16, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 5], 1, "Concat", [1]],
        [-1, 1, "RepC3", [16]],
        # classes, hidden width, queries, sampling points, attention heads, decoder layers, feed-forward width
        [[3, 13, 10], 1, "RTDETRDecoder", ["nc", 32, 20, 2, 2, 1, 64]],
    ],
}
# Counted by hand. HGStem has 5 convolutions with a ReLU, each HGBlock 4 (two inside, squeeze, excite); the Conv has a
# SiLU, RepC3 three (two Conv, one RepConv). The others of the head are AIFI's GELU and four ReLUs of the decoder.
CONV_SITES = 5 + 4 * 4 + 1 + 3
SILU_SITES = 4
TOKEN_SITES = 5

YOLO_BACKBONE = [
    [-1, 1, "Conv", [8, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "C2f", [16, True]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
]
YOLO_HEADS = {
    "detect": [[3, 4], 1, "Detect", ["nc"]],
    "segment": [[3, 4], 1, "Segment", ["nc", 4, 8]],
    "pose": [[3, 4], 1, "Pose", ["nc", [3, 3]]],
    "obb": [[3, 4], 1, "OBB", ["nc", 1]],
    "classify": [-1, 1, "Classify", ["nc"]],
}


def yolo(task: str = "detect") -> dict[str, Any]:
    """Return a YOLO model YAML of six rows for a task."""
    kpt = {"kpt_shape": [3, 3]} if task == "pose" else {}
    return copy.deepcopy({"nc": 2, **kpt, "backbone": YOLO_BACKBONE, "head": [YOLO_HEADS[task]]})


def with_rows(model_yaml: Mapping[str, Any], rows: Mapping[int, str], **top: Any) -> dict[str, Any]:
    """Return the model YAML with an activation as fifth item of some rows, and further top-level keys."""
    new = copy.deepcopy({**model_yaml, **top})
    every = new["backbone"] + new["head"]
    for index, activation in rows.items():
        every[index].append(activation)
    return new


def write_yaml(path: Path, data: Mapping[str, Any]) -> Path:
    """Write a YAML file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return path


def train_args(data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the arguments of a one-epoch run of two optimizer steps, large enough to move every parameter in fp16."""
    return {
        "data": str(data),
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
        "device": "cpu",
        "workers": 0,
        "verbose": False,
        "plots": False,
        "amp": False,
        "epochs": 1,
        "imgsz": 64,
        "batch": 4,
        "nbs": 4,  # a step after each batch
        "optimizer": "AdamW",
        "lr0": 0.01,
        "warmup_epochs": 0,
        "deterministic": False,  # True imports the whole of torch's compiler, 3 s in each fresh process
        **more,
    }


def train(model: Any, data: Path, folder: Path, **more: Any) -> Path:
    """Train one epoch and return the path of the last checkpoint."""
    model.train(**train_args(data, folder, deterministic=True, **more))
    return folder / "run" / "weights" / "last.pt"


def load(path: Path) -> Any:
    """Return the model that a checkpoint file holds, in float32, without any code of Ultralytics or ours in between."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    return (checkpoint["model"] or checkpoint["ema"]).float()


def count(model: Any, cls: type) -> int:
    """Count the places that hold a module of exactly this class; each must hold a module of its own."""
    places = [m for _, m in model.named_modules(remove_duplicate=False) if type(m) is cls]
    assert len({id(module) for module in places}) == len(places), f"{cls.__name__} shared between sites"
    return len(places)


def activations(model: Any) -> dict[str, Any]:
    """Return the placed activations by name, found by class or by the name of their attribute, not by our marks."""
    from torch import nn

    kinds = ("rtdetr_act.activations.", "torch.nn.modules.activation")
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module).__module__.startswith(kinds) and not isinstance(module, (nn.MultiheadAttention, nn.Sigmoid))
    }


def outside(model: Any) -> dict[str, Any]:
    """Return a copy of the state dict without what belongs to activations."""
    inside = tuple(f"{name}." for name in activations(model))
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(inside)}


def run_python(code: str, folder: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, which knows nothing of rtdetr_act unless the code imports it."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.py"
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def draw_images(folder: Path, labels: Mapping[str, Iterable[str]]) -> None:
    """Write eight 64x64 images with one coloured square each; the labels are format strings over its corners."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(8):
        image = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)[..., ::-1].copy()
        x, y = (int(value) for value in rng.integers(4, 34, 2))
        image[y : y + 24, x : x + 24] = (40, 40, 255) if number % 2 else (40, 255, 40)
        corners = {"cls": number % 2, "a": x / 64, "b": (x + 24) / 64, "c": y / 64, "d": (y + 24) / 64}
        for name, lines in labels.items():
            for kind in ("images", "labels"):
                (folder / name / kind).mkdir(parents=True, exist_ok=True)
            # Not OpenCV, which takes every path for UTF-8, or on Windows for the system's own encoding.
            Image.fromarray(image).save(folder / name / "images" / f"{number}.png")
            text = "\n".join(line.format(**corners, x=(x + 12) / 64, y=(y + 12) / 64) for line in lines)
            (folder / name / "labels" / f"{number}.txt").write_text(text + "\n")
        for split in ("train", "val"):
            classes = folder / "classify" / split / "ab"[number % 2]
            classes.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(classes / f"{number}.png")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what Ultralytics' logger says; whether caplog hears it depends on the release."""
    from ultralytics.utils import LOGGER

    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)


@contextmanager
def full_disk(size: int = 20_000) -> Iterator[None]:
    """Let every file end at this size, as on a disk that is full then."""
    import pytest  # not above: processes that tests start import this module, too

    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python does not notice that the bytecode it writes ends there, nor does one that it starts.
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = bytecode
        del os.environ["PYTHONDONTWRITEBYTECODE"]  # which tests/conftest.py has taken away
