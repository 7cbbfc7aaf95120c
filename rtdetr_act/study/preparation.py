"""Before the first run: check a study, write down its rows, and say how long they will take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ultralytics.data.utils import IMG_FORMATS

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import create_folder, remove_leftovers, write_files_atomically
from rtdetr_act.integrations.ultralytics.costs import time_training_step
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.shapes import SPLITS
from rtdetr_act.study.grid import (
    RunConfig,
    Study,
    check_runs,
    describe_difference,
    expand_study,
    find_splits,
    read_run_config,
)
from rtdetr_act.study.process import is_finished
from rtdetr_act.study.run_folders import read_run
from rtdetr_act.study.storage import (
    LATENCY_FILE,
    REPORT_FILES,
    RUN_FILE,
    RUNS_FOLDER,
    STUDY_FILE,
    StudySettings,
    check_writable_files,
    encode_json,
    folder_exists,
)

# Of an image's part in a training step: forward and loss of the validation, in evaluation, against both ways.
_VALIDATION_COST = 0.4
STARTUP_SECONDS = 10.0  # seconds for a process, its imports, its model and the final validation


def prepare_runs(study: Study, folder: Path, *, beside: Mapping[Path, Any] = MappingProxyType({})) -> list[Path]:
    """Check a study against what its folder holds, and write the rows that are new; nothing is written if one is wrong.

    Args:
        study: The study; it may be larger than the one that the folder holds.
        folder: Its folder, locked by the caller.
        beside: Further records to write with the rows, as plain data by their paths.

    Returns:
        The run folders in the order of the rows.

    Raises:
        RtdetrActError: A row cannot run, or the folder holds another study.
    """
    rows, recorded = check_study(study, folder)
    check_writable_files(folder, [*REPORT_FILES, STUDY_FILE, LATENCY_FILE])
    contents = {path: encode_json(data) for path, data in beside.items()}
    new = {folder / RUNS_FOLDER / row.name: row for row in rows if row.name not in recorded}
    contents |= {path / RUN_FILE: encode_json(row.to_json()) for path, row in new.items()}
    contents[folder / STUDY_FILE] = encode_json(asdict(StudySettings(study.baseline)))
    try:
        _remove_abandoned_folders(folder)
        with ExitStack() as made:  # of the folders, those that are new go again if something fails
            for path in new:
                made.enter_context(create_folder(path))
            write_files_atomically(contents)
    except OSError as error:
        raise InputError(
            f"cannot write to {quote(str(folder))}: {error.strerror or error}; nothing was started"
        ) from None
    return [folder / RUNS_FOLDER / row.name for row in rows]


def _remove_abandoned_folders(folder: Path) -> None:
    """Remove run folders that a killed process was about to fill."""
    for path in folder.glob(f"{RUNS_FOLDER}/*"):
        if path.is_dir() and not (path / RUN_FILE).exists():
            remove_leftovers(path / RUN_FILE)
            with suppress(OSError):  # not empty: somebody else's
                path.rmdir()


def check_study(study: Study, folder: Path, *, looking: bool = False) -> tuple[list[RunConfig], dict[str, RunConfig]]:
    """Return the rows of a study, and those that its folder holds already by their names.

    Nothing is written but the embedded data set to the user's cache, and with `looking` not that either.

    Raises:
        RtdetrActError: A row cannot run, or the folder holds another study or a damaged record.
    """
    rows = expand_study(study)
    recorded = read_run_configs(folder)
    if difference := describe_difference(rows, recorded):
        raise InputError(f"'{folder}' holds another study: {difference}; give another folder with --output")
    check_runs(rows, known=recorded, looking=looking)
    return rows, recorded


def read_run_configs(folder: Path) -> dict[str, RunConfig]:
    """Return the rows of the runs in the folder of a study, by their names.

    Raises:
        InputError: A record of a run is damaged, or of another folder.
    """
    found = {}
    for path in sorted(folder.glob(f"{RUNS_FOLDER}/*/{RUN_FILE}")) if folder_exists(folder) else []:
        record = read_run(path.parent)  # its result and attempts too: they are read again when the runs are over
        if record.name != path.parent.name:
            raise InputError(f"'{path}' is of the run {quote(record.name)}: move its folder out of the study")
        row = read_run_config(path.parent)
        assert row is not None
        found[row.name] = row
    return found


def is_study_finished(study: Study, folder: Path) -> bool:
    """Say whether all runs of a study have their results."""
    return folder_exists(folder) and all(is_finished(folder / RUNS_FOLDER / row.name) for row in expand_study(study))


def estimate_seconds(rows: Sequence[RunConfig], folder: Path, *, device: str) -> dict[str, float]:
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
        record = read_run(folder / RUNS_FOLDER / row.name) if is_finished(folder / RUNS_FOLDER / row.name) else None
        if record and not math.isnan(record.seconds_per_epoch):
            paces.setdefault(row.variant, []).append(record.seconds_per_epoch)
    for row in rows:
        if row.variant not in paces:
            paces[row.variant] = [_estimate_epoch_seconds(row, device)]
    return {
        row.name: 0.0
        if is_finished(folder / RUNS_FOLDER / row.name)
        else STARTUP_SECONDS + statistics.mean(paces[row.variant]) * int(row.arguments.get("epochs", 100))
        for row in rows
    }


def _estimate_epoch_seconds(row: RunConfig, device: str) -> float:
    _, model = load_variant(row.model, row.activation, scope=row.scope, act_lr=row.act_lr)
    data = find_splits(row.data, str(model.task), looking=True)
    train, val = (_count_images(data[split]) if split in data else count for split, count in SPLITS.items())
    batch = min(int(row.arguments.get("batch", 16)), train)
    step = time_training_step(model, int(row.arguments.get("imgsz", 640)), batch, device)
    return step / batch * (train + (val * _VALIDATION_COST if row.arguments.get("val", True) else 0))


def _count_images(source: Any) -> int:
    """Count the images of a split: folders, or text files with a path per line."""
    count = 0
    for path in map(Path, source if isinstance(source, (list, tuple)) else [source]):
        if path.is_dir():
            count += sum(file.suffix[1:].lower() in IMG_FORMATS for file in path.rglob("*.*"))
        else:
            text = path.read_text(encoding="utf-8", errors="replace")
            count += sum(bool(line.strip()) for line in text.splitlines())
    return max(count, 1)
