"""Measure what a study costs beside the trainings themselves.

    python scripts/bench_study.py [--output runs/bench-study]

Overhead: a study of two runs of about a minute, one after the other, against a plain script that makes the same two
trainings with Ultralytics, each in a process of its own; both with all cores. Parallel: four shorter runs of one thread
each, as many at once as there are cores, against one after the other. Leaderboard: leaderboard and page over 2,000
recorded runs. About ten minutes on two cores, which nothing else should use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from rtdetr_act.integrations.ultralytics.shapes import shapes
from rtdetr_act.study.grid import Study, expand_study
from rtdetr_act.study.local import Slot, run_locally
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.report import report_study
from rtdetr_act.study.storage import RESULT_FILE, RUN_FILE, RUNS_FOLDER, write_json

CORES = os.cpu_count() or 1
ACTIVATIONS = ("stock", "arelu")
PLAIN = """
import json, sys
import torch
from ultralytics import RTDETR
from rtdetr_act import patch_model

activation, threads, arguments = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = RTDETR("rtdetr-n.yaml")
if activation != "stock":
    patch_model(model, activation)
model.add_callback("on_pretrain_routine_start", lambda trainer: torch.set_num_threads(threads))
model.train(**arguments)
"""


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs.")] = Path("runs/bench-study"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the long runs.")] = 4,
) -> None:
    """Measure all three and print them."""
    shapes()  # made before the clock starts
    plain, whole, parts = measure_overhead(output / "overhead", epochs)
    together, apart = measure_parallel(output / "parallel")
    records, page = measure_leaderboard(output / "leaderboard")
    table = Table(title=f"Studies on {CORES} cores, seconds")
    for column in ("what", "study", "plain", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("two runs, one after the other", f"{whole:.1f}", f"{plain:.1f}", f"{whole / plain - 1:+.1%}")
    for name, seconds in parts.items():
        table.add_row(f"  of it {name}", f"{seconds:.1f}", "", "")
    table.add_row(f"four runs, {CORES} at once / alone", f"{together:.1f}", f"{apart:.1f}", f"{together / apart:.2f}")
    table.add_row(f"leaderboard and page of {records:,} runs", f"{page:.2f}", "", "")
    Console(width=100).print(table)


def measure_overhead(folder: Path, epochs: int) -> tuple[float, float, dict[str, float]]:
    """Return the seconds of plain trainings, of a study of the same, and what the study spends beside its runs."""
    study = Study(ACTIVATIONS, ("rtdetr-n.yaml",), ("shapes",), seeds=(0,), arguments={"epochs": epochs})
    started = time.perf_counter()
    for row in expand_study(study):
        place = {"project": str((folder / "plain").resolve()), "name": row.name, "exist_ok": True, "device": "cpu"}
        arguments = {**row.arguments, **place, "seed": row.seed, "data": str(shapes())}
        run_quietly([sys.executable, "-c", PLAIN, str(row.activation), str(CORES), json.dumps(arguments)])
    plain = time.perf_counter() - started
    command = ["study", "--cpus", str(CORES), "--seeds", "1", "--output", str(folder / "study"), f"epochs={epochs}"]
    for name in ACTIVATIONS:
        command += ["--act", name]
    started = time.perf_counter()
    run_quietly([sys.executable, "-c", "from rtdetr_act.cli.main import main; main()", *command])
    whole = time.perf_counter() - started
    started = time.perf_counter()
    report_study(folder / "study")
    return plain, whole, {"leaderboard and page": time.perf_counter() - started}


def run_quietly(command: Sequence[str]) -> None:
    """Run a command; what it prints is shown if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}\n{result.stderr}")


def measure_parallel(folder: Path) -> tuple[float, float]:
    """Return the seconds of four runs of one thread each, as many at once as there are cores, and one by one."""
    seconds = []
    for name, places in (("together", CORES), ("apart", 1)):
        short = {"epochs": 2, "imgsz": 96}
        study = Study(("stock",), ("rtdetr-n.yaml",), ("shapes",), seeds=(0, 1, 2, 3), arguments=short)
        folders = prepare_runs(study, folder / name)
        started = time.perf_counter()
        run_locally(folders, [Slot("cpu", 1)] * places, retries=0, watch=lambda working: None)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def measure_leaderboard(folder: Path, variants: int = 40, seeds: int = 50) -> tuple[int, float]:
    """Return how many runs were recorded, and the seconds to read them all and write leaderboard and page."""
    noise = np.random.default_rng(0)
    study = Study(
        ("stock", *(f"leaky_relu({slope / 100})" for slope in range(1, variants))),
        ("rtdetr-n.yaml",),
        ("shapes",),
        seeds=tuple(range(seeds)),
    )
    header = "epoch,time,train/giou_loss,metrics/mAP50(B),metrics/mAP50-95(B)\n"
    for row in expand_study(study):
        path = folder / RUNS_FOLDER / row.name
        path.mkdir(parents=True, exist_ok=True)
        score = float(noise.normal(0.5, 0.01))
        write_json(path / RUN_FILE, row.to_plain())
        lines = [f"{epoch},{epoch * 9},{1 / epoch},{score},{score * (1 - 0.9**epoch)}" for epoch in range(1, 101)]
        (path / "results.csv").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
        result = {"state": "done", "scores": {"mAP50": score + 0.2, "mAP50-95": score}, "epochs": 100, "sites": 51}
        result |= {"classes": {"a": score, "b": score + 0.1}, "parameters": 907885, "gflops_640": 1.2}
        write_json(path / RESULT_FILE, result)
    started = time.perf_counter()
    report_study(folder)
    return variants * seeds, time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
