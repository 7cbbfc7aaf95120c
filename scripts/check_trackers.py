"""Train one epoch with each tracker that Ultralytics knows, offline, and look for the plan and the slopes in its files.

    pip install tensorboard mlflow wandb comet_ml clearml
    python scripts/check_trackers.py [name …]

Each trains rtdetr-n with `arelu@backbone, dyrelu_b@neck` on `shapes`, small, in a process of its own, since trackers
do not like each other's company. What is found is compared with activations.csv; exits with 1 where a tracker that is
installed lacks something. About half a minute each on two cores.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PLAN = "arelu@backbone, dyrelu_b@neck"
PREFIX = "activations/"
# A tracker's files go below the folder of its run, and it talks to no server.
OFFLINE = {
    "tensorboard": {},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{folder}/mlflow.db"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    "comet": {"COMET_START_ONLINE": "0", "COMET_MODE": "offline", "COMET_OFFLINE_DIRECTORY": "{folder}/comet"},
    "clearml": {"CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": "{folder}/clearml"},
}


@dataclass(frozen=True)
class Found:
    """What the files of a tracker say: the plan (None if it is not there), the parameters of the epoch, the file."""

    plan: str | None
    parameters: dict[str, float]
    where: Path


def main(wanted: list[str]) -> int:
    """Train with each tracker, read its files, print the table, and return the exit code."""
    table = Table("tracker", "version", "plan found", "parameters found", "where")
    failed = False
    for name in wanted or OFFLINE:
        package = "comet_ml" if name == "comet" else name
        try:
            release = version(package)
        except PackageNotFoundError:
            table.add_row(name, "not installed", "-", "-", "-")
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            plan, parameters, where = check(name, Path(folder).resolve())
        failed |= not (plan.startswith("yes") and parameters.startswith("all"))
        table.add_row(name, release, plan, parameters, where)
    Console(width=160).print(table)
    return int(failed)


def check(name: str, folder: Path) -> tuple[str, str, str]:
    """Return three cells of the table: the plan, the parameters, and where they were."""
    (folder / "config").mkdir()
    offline = {key: value.format(folder=folder.as_posix()) for key, value in OFFLINE[name].items()}
    env = {**os.environ, **offline, "YOLO_CONFIG_DIR": str(folder / "config"), "YOLO_OFFLINE": "True"}
    process = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--train", name],
        cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=900,
    )  # fmt: skip
    error = next((line for line in reversed(process.stderr.splitlines()) if "Error" in line), "an error")
    note = f" (the process ended with {error})" if process.returncode else ""
    try:
        expected = saved_parameters(folder)
        found = READERS[name](folder)
    except (StopIteration, LookupError, OSError, ValueError) as missing:
        return "no", "no", f"{type(missing).__name__} {missing}{note}"
    logged = found.parameters
    right = [key for key in expected if key in logged and math.isclose(logged[key], expected[key], rel_tol=1e-5)]
    plan = "yes" if found.plan == PLAN else f"no: {found.plan}"
    count = "all" if len(right) == len(logged) == len(expected) else "not all"
    parameters = f"{count}: {len(right)} of {len(expected)}, as in activations.csv"
    return plan, parameters, f"{found.where.relative_to(folder)}{note}"


def train(name: str) -> None:
    """Train one epoch below the working directory, with this tracker switched on and the others off."""
    from ultralytics import settings  # before RTDETR: 8.3 reads the settings when it imports its callbacks

    settings.update({key: key == name for key in settings if key in {*OFFLINE, "dvc", "neptune", "raytune", "hub"}})

    from ultralytics import RTDETR

    from rtdetr_act import patch_model, shapes

    model = RTDETR("rtdetr-n.yaml")
    patch_model(model, PLAN)
    model.train(
        data=str(shapes()), project=str(Path.cwd() / "runs"), name="run", epochs=1, imgsz=64, batch=4, fraction=0.05,
        workers=0, device="cpu", plots=False, verbose=False, seed=0,
    )  # fmt: skip


def saved_parameters(folder: Path) -> dict[str, float]:
    """Read the quantities of the last epoch from the run's own file."""
    from rtdetr_act.analysis.history import HISTORY_FILE, read_history

    history = read_history(folder / "runs" / "run" / HISTORY_FILE)
    last = history.filter(history["epoch"] == history["epoch"].max()).select("site", "quantity", "value")
    return {f"{PREFIX}{site}.{name}": value for site, name, value in last.iter_rows()}


def read_tensorboard(folder: Path) -> Found:
    """Read the event file."""
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    path = next(folder.rglob("events.out.tfevents.*"))
    events = reader.EventAccumulator(str(path)).Reload()
    plan = events.Tensors(f"{PREFIX}plan/text_summary")[0].tensor_proto.string_val[0].decode()
    names = [tag for tag in events.Tags()["scalars"] if tag.startswith(PREFIX)]
    return Found(plan, {name: events.Scalars(name)[-1].value for name in names}, path)


def read_mlflow(folder: Path) -> Found:
    """Read the database."""
    path = folder / "mlflow.db"
    client = import_module("mlflow").MlflowClient(f"sqlite:///{path.as_posix()}")
    run = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])[0].data
    return Found(run.params.get(PREFIX + "plan"), _ours(run.metrics), path)


def read_wandb(folder: Path) -> Found:
    """Read the records of the run."""
    messages = import_module("wandb.proto.wandb_internal_pb2")
    path = next(folder.rglob("run-*.wandb"))
    config: dict[str, Any] = {}
    history: dict[str, Any] = {}
    for content in _log_records(path.read_bytes()[7:], start=7):
        record = messages.Record.FromString(content)
        config.update(_values([*record.run.config.update, *record.config.update]))
        history.update(_values(record.history.item))
    return Found(config.get(PREFIX + "plan"), _ours(history), path)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _log_records(content: bytes, start: int) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, which are cut at each 32 KiB; part 1 is a whole, 2 the first, 4 the last."""
    position, parts = 0, b""
    while position + 7 <= len(content):
        left = 32768 - (position + start) % 32768
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def read_comet(folder: Path) -> Found:
    """Read the messages in the archive."""
    path = next(folder.rglob("*.zip"))
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("messages.json").decode().splitlines()
    payloads = [json.loads(line)["payload"] for line in lines]
    settings = {p["param"]["paramName"]: p["param"]["paramValue"] for p in payloads if p.get("param")}
    metrics = {p["metric"]["metricName"]: p["metric"]["metricValue"] for p in payloads if p.get("metric")}
    return Found(settings.get(PREFIX + "plan"), {k: float(v) for k, v in _ours(metrics).items()}, path)


def read_clearml(folder: Path) -> Found:
    """Read the folder of the offline session."""
    path = next(folder.rglob("task.json"))
    sections = json.loads(path.read_text(encoding="utf-8"))["hyperparams"]
    lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for line in lines for event in json.loads(line)]
    metrics = {event["variant"]: event["value"] for event in events if event.get("value") is not None}
    return Found(sections["General"].get(PREFIX + "plan", {}).get("value"), _ours(metrics), path)


def _ours(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(PREFIX)}


READERS: dict[str, Callable[[Path], Found]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "comet": read_comet,
    "clearml": read_clearml,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
