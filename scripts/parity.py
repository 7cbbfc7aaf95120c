"""Compare every activation in every export format with torch, on images.

    python scripts/parity.py [--output docs/parity.md] [--act arelu --act mish] [--epochs 4]

Trains rtdetr-n and yolo11n on the embedded shapes for a few epochs, puts each activation of the zoo into them (their
parameters drawn at random, BatchNorm's statistics measured anew), exports that to each format and runs both on the same
images: of the shapes, and the photographs that come with Ultralytics. The torch side is neither fused nor folded.

An error is the largest difference of a score or of a box (in units of the image), over all images. Of torch's 50 best
detections of each image, those count as matched of which the export has one of the same class, with an IoU of 0.9 and a
score within 0.02. The figures go beside the table as JSON, where `scripts/bench_acts.py` reads them; with --act or
--only, the other rows stay. About 15 minutes on two cores, with Ultralytics 8.4.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from parity_table import DEFAULT, DOUBLE, compose_markdown, format_table, merge_rows, read_table
from torch import Tensor, nn
from ultralytics.data.augment import LetterBox
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import ASSETS, LOGGER

from rtdetr_act import names, patch_model, shapes
from rtdetr_act.analysis.measured import FORMATS
from rtdetr_act.errors import InputError
from rtdetr_act.files import write_files_atomically
from rtdetr_act.integrations.ultralytics.export import export_model
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS, SIDE
from rtdetr_act.surgery.sites import iterate_placed_activations

try:
    from ultralytics.utils.nms import non_max_suppression
except ImportError:  # before 8.3.200
    from ultralytics.utils.ops import non_max_suppression

MODELS = ("rtdetr-n.yaml", "yolo11n.yaml")
ARGUMENTS = {
    "threshold": "threshold(0.1, 0.05)",
    "prelu": "prelu(per_channel=True)",
    "hardshrink": "hardshrink(0.1)",  # with 0.5 the trained features are nearly all 0, and all queries alike
    "softshrink": "softshrink(0.1)",
}
BEST = 50


def main(
    output: Annotated[Path, typer.Option(help="Markdown table to write; figures go beside it as JSON.")] = Path(
        "runs/parity/parity.md"
    ),
    act: Annotated[list[str] | None, typer.Option(help="Activations; all of the zoo if none.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Models; both if none.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the two trainings.")] = 4,
    folder: Annotated[Path, typer.Option(help="Where trained models and exported files go.")] = Path("runs/parity"),
) -> None:
    """Train, export, compare, write."""
    LOGGER.setLevel("ERROR")
    images = torch.cat([_read(path) for path in _image_files()])
    table = read_table(output.with_suffix(".json")) if act or only else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for model in only or MODELS:
        stem = Path(model).stem
        base = _train(model, folder / "base", epochs)
        for name in act or names():
            row = _compare(base, ARGUMENTS.get(name, name), images, folder / "exports" / stem / name)
            table = merge_rows(table, stem, {name: row})
            print(f"{stem:10} {name:12}", "  ".join(f"{key}: {cell}" for key, cell in row.items()), flush=True)
    contents = {output.with_suffix(".json"): format_table(table), output: compose_markdown(table)}
    write_files_atomically({path: text.encode() for path, text in contents.items()})
    print(f"file: {output}")


def _image_files() -> list[Path]:
    drawn = sorted((shapes().parent / "images" / "val").glob("*.png"))[:4]
    return [*drawn, *sorted(ASSETS.glob("*.jpg"))]


def _read(path: Path) -> Tensor:
    """Return an image as (1, 3, SIDE, SIDE) in 0..1, in RGB, with grey borders."""
    picture = LetterBox((SIDE, SIDE), auto=False)(image=cv2.imread(str(path)))
    return torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1))).float()[None] / 255


def _train(model: str, folder: Path, epochs: int) -> Path:
    stem = Path(model).stem
    weights = folder.absolute() / stem / "weights" / "best.pt"
    if not weights.is_file():
        settings = {**SHAPES_SETTINGS, "epochs": epochs, "verbose": False}
        load_model(model).train(
            data=str(shapes()), project=str(folder.absolute()), name=stem, exist_ok=True, **settings
        )
    return weights


def _compare(base: Path, activation: str, images: Tensor, folder: Path) -> dict[str, str]:
    model = load_model(str(base))
    torch.manual_seed(0)
    patch_model(model, activation)
    _unsettle(model.model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.model.pt_path = str(folder / "model.pt")
    with torch.no_grad():
        expected = [model.model(image[None])[0] for image in images]
        exact = deepcopy(model.model).double()
        cells = {DOUBLE: _judge(expected, [exact(image[None].double())[0].float() for image in images])}
    for form in FORMATS:
        try:
            path = export_model(model, form, imgsz=SIDE, verbose=False)
        except InputError as error:
            cells[form] = f"refused ({error})"
            continue
        runners = {form: AutoBackend(str(path), device=torch.device("cpu"), verbose=False)}
        if form == "openvino":
            runners = {form: _openvino(path), DEFAULT: runners[form]}
        for name, run in runners.items():
            cells[name] = _judge(expected, [_first(run(image[None])) for image in images])
    return cells


def _unsettle(model: nn.Module) -> None:
    """Move an activation's parameters away from their start, and let BatchNorm see what comes of it."""
    for _, activation in iterate_placed_activations(model):
        for parameter in activation.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    files = sorted((shapes().parent / "images" / "train").glob("*.png"))[:64]
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for start in range(0, len(files), 16):
            model(torch.cat([_read(path) for path in files[start : start + 16]]))
    model.eval()


def _openvino(path: Path) -> Callable[[Tensor], Any]:
    import openvino

    file = str(next(Path(path).glob("*.xml")))
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: compiled(image.numpy())[0]


def _first(result: Any) -> Tensor:
    return torch.as_tensor(result[0] if isinstance(result, (list, tuple)) else result)


def _judge(expected: list[Tensor], found: list[Tensor]) -> str:
    pairs = [(_rows(one), _rows(other)) for one, other in zip(expected, found, strict=True)]
    if any(not torch.isfinite(other).all() for _, other in pairs):
        return "not finite"
    error = max(_error(one, other) for one, other in pairs)
    matches = [_match(_detections(one), _detections(other)) for one, other in zip(expected, found, strict=True)]
    hits, total = (sum(values) for values in zip(*matches, strict=True))
    return f"{error:.0e}, {hits} of {total}"


def _rows(raw: Tensor) -> Tensor:
    """Return a raw output as rows: a box in units of the image, and what the model says of it."""
    if _is_rtdetr(raw):
        return raw[0]
    return torch.cat([raw[0, :4] / SIDE, raw[0, 4:]]).T


def _is_rtdetr(raw: Tensor) -> bool:
    """Say whether a raw output is RT-DETR's (1, queries, box + score + class), not YOLO's (1, …, anchors)."""
    return raw.shape[-1] == 6


def _error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between rows; RT-DETR's queries may have changed their order."""
    if one.shape == other.shape and (direct := (one - other).abs().max().item()) < 1e-3:
        return direct
    return torch.cdist(one, other, p=float("inf")).min(1).values.max().item()


def _detections(raw: Tensor) -> Tensor:
    """Return (n, 6): a box x, y, x, y in units of the image, score, class, best first."""
    if not _is_rtdetr(raw):
        kept = non_max_suppression(raw, 1e-4, 0.7, max_det=2 * BEST)[0]
        return torch.cat([kept[:, :4] / SIDE, kept[:, 4:6]], 1)
    centre, size, rest = raw[0, :, :2], raw[0, :, 2:4], raw[0, :, 4:]
    return torch.cat([centre - size / 2, centre + size / 2, rest], 1)


def _match(expected: Tensor, found: Tensor) -> tuple[int, int]:
    from torchvision.ops import box_iou

    expected = expected[:BEST]
    near = box_iou(expected[:, :4], found[:, :4]) >= 0.9
    near &= (expected[:, 4, None] - found[:, 4]).abs() <= 0.02
    near &= expected[:, 5, None] == found[:, 5]
    return int(near.any(1).sum()), len(expected)


if __name__ == "__main__":
    typer.run(main)
