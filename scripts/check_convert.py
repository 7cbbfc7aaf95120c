"""Measure what a conversion loses: trained detectors get other activations, refitted on several choices of images.

    python scripts/check_convert.py a/best.pt b/best.pt --data bccd.yaml --imgsz 160 --act relu,hardswish --seeds 3

For each checkpoint and activation: the mAP50-95 of the checkpoint, after the swap alone, after refit on 128 training
images that the seed chooses, with the statistics of BatchNorm of these images, after three epochs of training with the
settings of `rtdetr-act convert`, and of the ONNX files, float32 and INT8. The last three are measured for `--trained`
seeds. All are scored on the validation and the test split together, if the data set has one. Each cell is a file of its
own and is skipped where it is there already. Writes convert.csv and convert.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STEPS = ("swapped", "refitted", "calibrated", "trained", "onnx", "onnx int8")


def main() -> None:
    """Measure what is missing, then write the tables."""
    given = parse_words()
    given.output.mkdir(parents=True, exist_ok=True)
    for source in given.sources:
        for seed in range(given.seeds):
            for activation in given.act:
                measure(given, source, activation, seed)
    write_tables(given)


def parse_words() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="checkpoints")
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, required=True)
    parser.add_argument("--act", type=lambda text: text.split(","), default="relu,relu6,leaky_relu,hardswish,arelu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trained", type=int, default=1, help="seeds that are trained and exported, too")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--no-export", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/check-convert"))
    return parser.parse_args()


def measure(given: argparse.Namespace, source: str, activation: str, seed: int) -> None:
    """Measure one cell, and write it as JSON; each step as soon as it is done."""
    from rtdetr_act.files import write_atomically

    name = f"{Path(source).parents[1].name}-{given.imgsz}-{activation}-s{seed}"
    path = given.output / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cell = {
        "model": Path(source).parents[1].name,
        "imgsz": given.imgsz,
        "activation": activation,
        "seed": seed,
        **known,
    }
    for step, value in list_steps(given, source, activation, seed, cell):
        cell[step] = value
        write_atomically(path, json.dumps(cell, indent=1).encode())
        print(f"{name}: {step} {value:.4f}", flush=True)


def list_steps(
    given: argparse.Namespace, source: str, activation: str, seed: int, cell: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Yield the steps that a cell lacks, with their scores, and the minutes that they took."""
    from rtdetr_act import calibrate, patch_model, refit
    from rtdetr_act.integrations.ultralytics.export import export_model
    from rtdetr_act.integrations.ultralytics.models import load_checkpoint, save_checkpoint
    from rtdetr_act.integrations.ultralytics.runs import run_training
    from rtdetr_act.workflows.convert import TRAINING

    folder = given.output / "files" / f"{cell['model']}-{given.imgsz}-{activation}-s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if "stock" not in cell:
        yield "stock", score(given, source)
    if "swapped" not in cell:
        model = load_checkpoint(source)
        patch_model(model, activation)
        save_checkpoint(model, folder / "swapped.pt")
        yield "swapped", score(given, folder / "swapped.pt")
    if "refitted" not in cell or not (folder / "calibrated.pt").exists():
        model = load_checkpoint(source)
        images = choose_images(given, model, seed)
        patch_model(model, activation, init="match")
        started = time.monotonic()
        refit(model, images)
        minutes = (time.monotonic() - started) / 60
        save_checkpoint(model, folder / "refitted.pt")
        calibrate(model, images.split(16))
        save_checkpoint(model, folder / "calibrated.pt")
        yield "refitted", score(given, folder / "refitted.pt")
        yield "minutes", minutes
        yield "calibrated", score(given, folder / "calibrated.pt")
    if seed >= given.trained:
        return
    if "trained" not in cell and given.epochs:
        model = load_checkpoint(folder / "refitted.pt")
        started = time.monotonic()
        place = {"project": str(folder.resolve()), "name": "train", "exist_ok": True, "seed": seed}
        settings = {"data": given.data, "imgsz": given.imgsz, "epochs": given.epochs, "batch": 4, "workers": 0}
        run_training(model, **{**TRAINING, **settings, **place, "device": "cpu", "verbose": False, "amp": False})
        yield "training minutes", (time.monotonic() - started) / 60
        yield "trained", score(given, folder / "train" / "weights" / "best.pt")
    for step in () if given.no_export else ("onnx", "onnx int8"):
        if step not in cell:
            model = load_checkpoint(folder / "refitted.pt")
            int8 = step.endswith("int8")
            calibration = {"data": given.data} if int8 else {}
            yield step, score(given, export_model(model, "onnx", int8=int8, imgsz=given.imgsz, **calibration))


def choose_images(given: argparse.Namespace, model: Any, seed: int) -> Any:
    """Return training images that a seed chooses, without augmentation, (B, 3, H, W) in 0..1."""
    import torch

    from rtdetr_act.integrations.ultralytics.datasets import check_data
    from rtdetr_act.integrations.ultralytics.images import open_validation

    data = check_data(given.data, str(model.task))
    dataset = open_validation(model, {**data, "val": data["train"]}, given.imgsz)[1]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    images: list[Any] = []
    for index in order:
        image = dataset[index]["img"]
        if not images or image.shape == images[0].shape:
            images.append(image.float() / 255 if image.dtype == torch.uint8 else image)
        if len(images) == given.images:
            break
    return torch.stack(images)


def score(given: argparse.Namespace, path: str | Path) -> float:
    """Return the mAP50-95 of a checkpoint or an exported file, on all labelled images that were not trained on."""
    import tempfile

    from ultralytics import RTDETR, YOLO

    from rtdetr_act.integrations.ultralytics.datasets import check_data
    from rtdetr_act.integrations.ultralytics.results import read_scores

    data = check_data(given.data, "detect")
    held_out = [data[split] for split in ("val", "test") if data.get(split)]
    with tempfile.TemporaryDirectory() as place:
        both = Path(place) / "held-out.yaml"
        names = json.dumps(dict(data["names"]))
        both.write_text(f"train: {data['train']}\nval: {json.dumps(held_out)}\nnames: {names}\n", encoding="utf-8")
        cls = RTDETR if "rtdetr" in str(path) else YOLO
        # Square images in all formats, of which an exported file takes one at a time.
        batch = 16 if str(path).endswith(".pt") else 1
        settings = {"batch": batch, "rect": False, "workers": 0, "plots": False, "verbose": False, "device": "cpu"}
        found = cls(str(path)).val(data=str(both), imgsz=given.imgsz, project=place, name="val", **settings)
    return read_scores(found)["mAP50-95"]


def write_tables(given: argparse.Namespace) -> None:
    """Write every cell, and per model and activation the means over the seeds and the relative losses."""
    import polars as pl

    from rtdetr_act.files import write_atomically

    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(given.output.glob("*.json"))]
    table = pl.DataFrame(cells, infer_schema_length=None)
    write_atomically(given.output / "convert.csv", table.write_csv().encode())
    text = "\n".join(summarise(cells)) + f"\n\n`{shlex.join(sys.argv)}`\n"
    write_atomically(given.output / "convert.md", text.encode())
    print(text)


def summarise(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the Markdown table."""
    yield f"| model | imgsz | activation | stock | {' | '.join(STEPS)} | loss after refit | minutes |"
    yield "|---|---|---|" + "---:|" * (len(STEPS) + 3)
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["imgsz"], cell["activation"]), []).append(cell)
    for (model, imgsz, activation), own in sorted(groups.items()):
        means = [format_mean([cell[step] for cell in own if step in cell]) for step in ("stock", *STEPS)]
        losses = [100 * (1 - cell["refitted"] / cell["stock"]) for cell in own if "refitted" in cell]
        minutes = [cell["minutes"] for cell in own if "minutes" in cell]
        took = f"{sum(minutes) / len(minutes):.1f}" if minutes else "–"
        yield f"| {model} | {imgsz} | {activation} | {' | '.join(means)} | {format_interval(losses)} | {took} |"


def format_mean(values: Sequence[float]) -> str:
    """Return the mean of some scores, with the deviation where there are several."""
    import statistics

    if not values:
        return "–"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f}" + (f" ± {spread:.4f}" if spread > 5e-5 else "")


def format_interval(values: Sequence[float]) -> str:
    """Return the mean of paired relative losses in percent, with the 95 % interval of t over the seeds."""
    import statistics

    from scipy import stats

    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f} %"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f})"


if __name__ == "__main__":
    main()
