"""Before the first run: check a study, write down its rows, and say how long they will take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.bench import time_training_step
from rtdetr_act.errors import InputError
from rtdetr_act.runs import check_data, load_variant, resolve_data
from rtdetr_act.study.folder import ROW_FILE, RUNS, STUDY_FILE, read_json, write_json
from rtdetr_act.study.grid import Row, Study, check_rows, differing, make_rows
from rtdetr_act.study.process import is_finished
from rtdetr_act.study.records import read_run

# Of an image's part in a training step: forward and loss of the validation, in evaluation, against both ways.
_VALIDATION = 0.4
START = 10.0  # seconds for a process, its imports, its model and the final validation


def prepare_runs(study: Study, folder: Path) -> list[Path]:
    """Check a study against what its folder holds, and write the rows that are new; nothing is written if one is wrong.

    Args:
        study: The study; it may be larger than the one that the folder holds.
        folder: Its folder, locked by the caller.

    Returns:
        The run folders in the order of the rows.

    Raises:
        RtdetrActError: A row cannot run, or the folder holds another study.
    """
    rows, recorded = check_study(study, folder)
    try:
        for partial in folder.rglob(".*.partial"):
            partial.unlink()
        for row in rows:
            if row.name not in recorded:
                path = folder / RUNS / row.name
                path.mkdir(parents=True, exist_ok=True)
                write_json(path / ROW_FILE, row.to_json())
        write_json(folder / STUDY_FILE, {"baseline": study.baseline})
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror or error}") from None
    return [folder / RUNS / row.name for row in rows]


def check_study(study: Study, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of a study, and as plain data those that its folder holds already; nothing is written.

    Raises:
        RtdetrActError: A row cannot run, or the folder holds another study.
    """
    rows = make_rows(study)
    recorded = {row["name"]: row for path in sorted(folder.glob(f"{RUNS}/*/{ROW_FILE}")) if (row := read_json(path))}
    if difference := differing(rows, recorded):
        raise InputError(f"'{folder}' holds another study: {difference}; give another folder with --output")
    check_rows(rows, known=recorded)
    return rows, recorded


def estimate_seconds(rows: Sequence[Row], folder: Path, *, device: str) -> dict[str, float]:
    """Return the seconds that each run will take by itself, by its name; 0 for a finished one.

    From the epochs of finished runs of the same variant, else from some training steps made now.

    Args:
        rows: The runs.
        folder: Of the study; it need not exist.
        device: "cpu", or the name of a GPU.

    Raises:
        RtdetrActError: A model cannot be trained here.
    """
    paces: dict[str, list[float]] = {}
    for row in rows:
        record = read_run(folder / RUNS / row.name) if is_finished(folder / RUNS / row.name) else None
        if record and not math.isnan(record.seconds_per_epoch):
            paces.setdefault(row.variant, []).append(record.seconds_per_epoch)
    for row in rows:
        if row.variant not in paces:
            paces[row.variant] = [_time_epoch(row, device)]
    return {
        row.name: 0.0
        if is_finished(folder / RUNS / row.name)
        else START + statistics.mean(paces[row.variant]) * int(row.arguments.get("epochs", 100))
        for row in rows
    }


def _time_epoch(row: Row, device: str) -> float:
    _, model = load_variant(row.model, row.activation, scope=row.scope, act_lr=row.act_lr)
    data = check_data(resolve_data(row.data), str(model.task))
    train, val = (_count_images(data[split]) for split in ("train", "val"))
    batch = min(int(row.arguments.get("batch", 16)), train)
    step = time_training_step(model, int(row.arguments.get("imgsz", 640)), batch, device)
    return step / batch * (train + (val * _VALIDATION if row.arguments.get("val", True) else 0))


def _count_images(source: Any) -> int:
    """Count the images of a split: folders, or text files with a path per line."""
    from ultralytics.data.utils import IMG_FORMATS

    count = 0
    for path in map(Path, source if isinstance(source, (list, tuple)) else [source]):
        if path.is_dir():
            count += sum(file.suffix[1:].lower() in IMG_FORMATS for file in path.rglob("*.*"))
        else:
            count += sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
    return max(count, 1)
