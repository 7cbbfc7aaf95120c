"""Measure what warm starts gain: a trained detector gets other activations and is fine-tuned, by every way to start.

    python scripts/check_warmstart.py --data bccd.yaml imgsz=160 batch=4 nbs=4 optimizer=AdamW mosaic=0 scale=0

For each model and seed it trains the stock network, swaps its activations, validates before the first step, and
fine-tunes. Epoch 0 is the network as it was swapped, with `match` as its training starts, refitted on 128 training
images; `0, calibrated` is it with BatchNorm statistics of such images. Every run is a process of its own and is skipped
where its result lies in the folder already. The table counts the epochs until the mean over the seeds has 95 percent
of the stock mAP. Writes warmstart.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "match": {"init": "match"},
}
SHARE = 0.95  # of the stock mAP, which a swap is to reach again


def main() -> None:
    """Run what is missing, then write the tables."""
    given = parse_words()
    if given.job:
        run_job(json.loads(given.job))
        return
    given.output.mkdir(parents=True, exist_ok=True)
    stock = list(stock_jobs(given))
    run_all(stock, given.parallel)
    tuned = list(tuning_jobs(given))
    run_all(tuned, given.parallel)
    write_tables(given, stock, tuned)


def parse_words() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help="Ultralytics arguments of all trainings")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--model", type=split, default="rtdetr-n.yaml,yolo11n.yaml")
    parser.add_argument("--act", type=split, default="relu,hardswish,arelu,dyrelu_b")
    parser.add_argument("--method", type=split, default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stock-epochs", type=int, default=30)
    parser.add_argument("--stock-lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/warmstart"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def split(text: str) -> list[str]:
    """Return the words between commas."""
    return text.split(",")


def stock_jobs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the trainings of the stock networks."""
    for seed in range(given.seeds):
        for model in given.model:
            yield {
                "folder": str(given.output / f"{Path(model).stem}-stock-s{seed}"),
                "model": model,
                "activation": None,
                "method": "stock",
                "how": {},
                "seed": seed,
                "data": given.data,
                "pairs": [*given.pairs, f"epochs={given.stock_epochs}", f"lr0={given.stock_lr}"],
            }


def tuning_jobs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the trainings after a swap, seeds in the outermost loop."""
    for seed in range(given.seeds):
        for model in given.model:
            stock = given.output / f"{Path(model).stem}-stock-s{seed}" / "run" / "weights" / "best.pt"
            for activation in given.act:
                for method in given.method:
                    name = f"{Path(model).stem}-{activation}-{method}-s{seed}"
                    yield {
                        "folder": str(given.output / name),
                        "model": str(stock),
                        "activation": activation,
                        "method": method,
                        "how": METHODS[method],
                        "seed": seed,
                        "data": given.data,
                        "pairs": [*given.pairs, f"epochs={given.epochs}", f"lr0={given.lr}"],
                    }


def run_all(jobs: Sequence[dict[str, Any]], parallel: int) -> None:
    """Run the jobs that have no result yet, some at once."""

    def run(job: dict[str, Any]) -> None:
        folder = Path(job["folder"])
        if (folder / "result.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            command = [sys.executable, __file__, "--job", json.dumps(job)]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{folder.name}: done" if code == 0 else f"{folder.name}: failed, see its log.txt", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run, jobs))


def run_job(job: dict[str, Any]) -> None:
    """Validate and train one network, and write its mAP50-95 after each epoch."""
    import torch

    from rtdetr_act import calibrate, refit
    from rtdetr_act.files import write_atomically
    from rtdetr_act.integrations.ultralytics.arguments import split_pairs
    from rtdetr_act.integrations.ultralytics.datasets import resolve_data
    from rtdetr_act.integrations.ultralytics.models import load_variant
    from rtdetr_act.integrations.ultralytics.results import read_scores
    from rtdetr_act.integrations.ultralytics.runs import run_training

    folder, arguments = Path(job["folder"]), split_pairs(job["pairs"])
    data = resolve_data(job["data"])
    scores: dict[str, Any] = {}
    if job["activation"]:
        images = training_images(data, int(arguments.get("imgsz", 640)))
        for name in ["0"] if job["method"] == "match" else ["0", "0 calibrated"]:
            _, model = load_variant(job["model"], job["activation"], **job["how"])
            if job["method"] == "match":
                refit(model, images)
            elif name == "0 calibrated":
                calibrate(model, images.split(16))
            kept = {key: value for key, value in arguments.items() if key in ("imgsz", "batch")}
            found = model.val(
                data=data, device="cpu", workers=0, plots=False, verbose=False, project=str(folder), **kept
            )
            scores[name] = read_scores(found)["mAP50-95"]
    _, model = load_variant(job["model"], job["activation"], **job["how"])
    model.add_callback("on_pretrain_routine_start", lambda trainer: torch.set_num_threads(1))
    place = {"project": str(folder.resolve()), "name": "run", "exist_ok": True}
    fixed = {"device": "cpu", "workers": 0, "plots": False, "verbose": False, "amp": False, "cache": "ram"}
    run_training(model, **{**fixed, **arguments, **place, "data": data, "seed": job["seed"]})
    scores |= read_epochs(folder / "run" / "results.csv")
    scores["best"] = read_scores(model.metrics)["mAP50-95"]
    write_atomically(folder / "result.json", json.dumps({**job, "scores": scores}, indent=1).encode())


def training_images(data: str, imgsz: int, count: int = 128) -> Any:
    """Return training images without augmentation, (B, 3, H, W) in 0..1."""
    import torch
    from ultralytics.data import YOLODataset

    from rtdetr_act.integrations.ultralytics.datasets import check_data

    known = check_data(data, "detect")
    dataset = YOLODataset(img_path=known["train"], imgsz=imgsz, data=known, augment=False, rect=False)
    return torch.stack([dataset[index]["img"].float() / 255 for index in range(min(count, len(dataset)))])


def read_epochs(results: Path) -> dict[str, float]:
    """Return mAP50-95 by epoch."""
    import polars as pl

    table = pl.read_csv(results, truncate_ragged_lines=True)
    names = {name.strip(): name for name in table.columns}
    epochs, scores = table[names["epoch"]], table[names["metrics/mAP50-95(B)"]]
    return {str(int(epoch)): float(score) for epoch, score in zip(epochs, scores, strict=True)}


def write_tables(given: argparse.Namespace, stock: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> None:
    """Write every score, and per model, activation and method the means over the seeds."""
    import polars as pl

    from rtdetr_act.files import write_atomically

    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for job in [*stock, *tuned]
        if (path := Path(job["folder"], "result.json")).exists()
    ]
    rows = [
        {
            "model": Path(result["folder"]).name.split("-stock")[0].split(f"-{result['activation']}-")[0],
            "activation": result["activation"] or "stock",
            "method": result["method"],
            "seed": result["seed"],
            "epoch": epoch,
            "score": score,
        }
        for result in results
        for epoch, score in result["scores"].items()
    ]
    table = pl.DataFrame(rows)
    write_atomically(given.output / "warmstart.csv", table.write_csv().encode())
    lines = summarise(table, given.epochs)
    text = "\n".join(lines) + f"\n\n`{shlex.join(sys.argv)}`\n"
    write_atomically(given.output / "warmstart.md", text.encode())
    draw(table, given)
    print(text)


def summarise(table: Any, epochs: int) -> Iterator[str]:
    """Yield the lines of the Markdown table."""
    import polars as pl

    shown = [str(epoch) for epoch in (0, 1, 5, epochs)]
    heads = " | ".join(f"epoch {epoch}" for epoch in shown)
    yield f"| model | activation | start | {heads} | 0, calibrated | epochs to 95 % |"
    yield "|---|---|---|" + "---|" * (len(shown) + 2)
    for (model,), of_model in table.group_by(["model"], maintain_order=True):
        best = of_model.filter((pl.col("method") == "stock") & (pl.col("epoch") == "best"))["score"]
        yield f"| {model} | stock | | {' | '.join(['-'] * len(shown))} | - | {spread(best)} |"
        for (activation, method), group in of_model.filter(pl.col("method") != "stock").group_by(
            ["activation", "method"], maintain_order=True
        ):
            cells = [spread(group.filter(pl.col("epoch") == epoch)["score"]) for epoch in [*shown, "0 calibrated"]]
            yield f"| {model} | {activation} | {method} | {' | '.join(cells)} | {first_epoch(group, best.mean())} |"


def first_epoch(group: Any, stock: float) -> str:
    """Return the first epoch whose mean over the seeds is good enough."""
    import polars as pl

    found = by_epoch(group).filter(pl.col("score") >= SHARE * stock)["epoch"]
    return str(found[0]) if len(found) else "never"


def by_epoch(group: Any) -> Any:
    """Return the mean score of each epoch."""
    import polars as pl

    numbered = group.filter(pl.col("epoch").str.contains(r"^\d+$")).with_columns(pl.col("epoch").cast(pl.Int64))
    return numbered.group_by("epoch").agg(pl.col("score").mean()).sort("epoch")


def spread(scores: Any) -> str:
    """Return mean and standard deviation in words."""
    if len(scores) == 0:
        return "-"
    return f"{scores.mean():.3f}" + (f" ± {scores.std():.3f}" if len(scores) > 1 else "")


def draw(table: Any, given: argparse.Namespace) -> None:
    """Draw the means over the epochs, a panel for each model and activation."""
    import polars as pl
    from matplotlib.figure import Figure

    from rtdetr_act.analysis.figures import figure_style, write_figure

    with figure_style():
        models = table["model"].unique(maintain_order=True).to_list()
        figure = Figure(figsize=(2.4 * len(given.act), 2.1 * len(models)))
        axes = figure.subplots(len(models), len(given.act), squeeze=False, sharex=True)
        for row, model in zip(axes, models, strict=True):
            of_model = table.filter(pl.col("model") == model)
            best = of_model.filter((pl.col("method") == "stock") & (pl.col("epoch") == "best"))["score"].mean()
            for axis, activation in zip(row, given.act, strict=True):
                axis.axhline(best, color="0.5", linewidth=0.8)
                axis.axhline(SHARE * best, color="0.5", linewidth=0.8, linestyle=":")
                axis.set_title(f"{model}, {activation}")
                for method in given.method:
                    group = of_model.filter((pl.col("activation") == activation) & (pl.col("method") == method))
                    means = by_epoch(group)
                    axis.plot(means["epoch"], means["score"], label=method, marker=".")
            row[0].set_ylabel("mAP50-95")
        for axis in axes[-1]:
            axis.set_xlabel("epochs after the swap")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        write_figure(figure, given.output / "warmstart.png")


if __name__ == "__main__":
    main()
