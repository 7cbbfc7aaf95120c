"""Train stock models with and without the plugin imported, and compare everything that a run leaves, to the bit.

Each training is a process of its own: RT-DETR and YOLO on a few drawn images, two epochs with plots, validation and the
final checkpoints; then the best checkpoint is exported to TorchScript. What differs between any two runs of the same
training is left out: dates, seconds, and the folder. About three minutes on two cores; exit code 1 where anything
differs. Run it with the Python of the environment whose releases are to be compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

TRAINING = """
import json, sys
{before}
from pathlib import Path
from ultralytics import RTDETR, YOLO, settings
{after}
settings.update({{"tensorboard": False}})  # on by default in 8.3; RT-DETR does not train with it in 8.4
source, arguments = sys.argv[1], json.loads(sys.argv[2])
model = (RTDETR if "rtdetr" in source else YOLO)(source)
model.train(**arguments)
YOLO(str(model.trainer.best)).export(format="torchscript", imgsz=arguments["imgsz"])
"""
WAYS = {
    "without the plugin": ("", ""),
    "imported before Ultralytics": ("import rtdetr_act", ""),
    "imported behind Ultralytics": ("", "import rtdetr_act"),
}
# The RT-DETR of the tests: ours would be found only where the plugin is imported, Ultralytics' take minutes a step.
MODELS = {"yolov8n.yaml": None, "rtdetr.yaml": tiny.RTDETR}


def main() -> None:
    """Compare all ways with the first, and print a line for each model and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="Data set YAML; drawn images if not given.")
    given = parser.parse_args()
    import ultralytics

    print(f"Ultralytics {ultralytics.__version__}, torch {torch.__version__}")
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        data = given.data or draw_data(Path(folder))
        for source, model in MODELS.items():
            runs = {way: train(Path(folder), source, model, data, way) for way in WAYS}
            first, *others = WAYS
            for way in others:
                differences = compare(runs[first], runs[way])
                different += bool(differences)
                print(f"{source}, {way}: {'; '.join(differences) or f'{len(runs[way])} files, all equal'}", flush=True)
    sys.exit(1 if different else 0)


def draw_data(folder: Path) -> Path:
    """Write a data set of the first 16 and 8 images of shapes."""
    from PIL import Image

    from rtdetr_act.integrations.ultralytics.shapes import describe_set, draw_scene

    place = folder / "shapes"
    for split, numbers in (("train", range(16)), ("val", range(16, 24))):
        for kind in ("images", "labels"):
            (place / kind / split).mkdir(parents=True)
        for number in numbers:
            pixels, labels = draw_scene(number)
            Image.fromarray(pixels).save(place / "images" / split / f"{number}.png")
            text = "".join(" ".join(map(str, label)) + "\n" for label in labels)
            (place / "labels" / split / f"{number}.txt").write_text(text, encoding="utf-8")
    (place / "shapes.yaml").write_text(describe_set(place), encoding="utf-8")
    return place / "shapes.yaml"


def train(folder: Path, source: str, model: dict[str, Any] | None, data: Path, way: str) -> dict[str, Any]:
    """Train in a new process, and return what its files hold, by their names."""
    before, after = WAYS[way]
    place = folder / source.partition(".")[0]
    arguments = {
        "data": str(data), "project": str(place / "runs"), "name": "run", "exist_ok": True, "epochs": 2, "batch": 4,
        "device": "cpu", "workers": 0, "amp": False, "plots": True, "optimizer": "auto", "close_mosaic": 1, "imgsz": 64,
    }  # fmt: skip
    place.mkdir(exist_ok=True)
    if model:
        tiny.write_yaml(place / source, model)
    code = TRAINING.format(before=before, after=after)
    result = subprocess.run(
        [sys.executable, "-c", code, source, json.dumps(arguments)],
        cwd=place,
        env={**os.environ, "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "True"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{source}, {way}: the training failed\n{result.stderr[-3000:]}")
    found = {path.relative_to(place).as_posix(): read(path) for path in place.rglob("*") if path.is_file()}
    for path in place.rglob("*"):
        if path.is_file():
            path.unlink()
    return found


def read(path: Path) -> Any:
    """Return what a file holds, without what differs between two runs of the same training."""
    if path.suffix == ".pt":
        return plain(torch.load(path, map_location="cpu", weights_only=False))
    if path.suffix == ".torchscript":
        extra = {"config.txt": ""}
        state = torch.jit.load(path, _extra_files=extra)
        metadata = json.loads(extra["config.txt"])
        metadata.pop("date", None)
        return [str(state.code), {name: plain(value) for name, value in state.state_dict().items()}, metadata]
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.open(encoding="utf-8"), skipinitialspace=True))
        return [{key: value for key, value in row.items() if key.strip() != "time"} for row in rows]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    content = path.read_bytes()
    return re.sub(rb"<dc:date>.*?</dc:date>", b"", content)


def plain(value: Any) -> Any:
    """Return a checkpoint as data that can be compared: tensors as bytes, modules as their class and state."""
    if isinstance(value, torch.Tensor):
        contiguous = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), contiguous.view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, torch.nn.Module):
        return [f"{name}: {type(module).__qualname__}" for name, module in value.named_modules()], plain(
            {**value.state_dict(), **{f"yaml.{key}": item for key, item in getattr(value, "yaml", {}).items()}}
        )
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in ("date", "time", "git")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name the files that only one run has, and those that differ."""
    found = [f"only without: {name}" for name in one if name not in other]
    found += [f"only with: {name}" for name in other if name not in one]
    return found + [f"differs: {name}" for name in one if name in other and not same(one[name], other[name])]


def same(one: Any, other: Any) -> bool:
    """Say whether two values are equal, NaN equal to itself."""
    if isinstance(one, dict) and isinstance(other, dict):
        without_time = [{k: v for k, v in each.items() if k != "time"} for each in (one, other)]
        left, right = without_time
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


if __name__ == "__main__":
    main()
