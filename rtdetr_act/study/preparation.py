"""Preparation of a study: checks, run folders and time estimates before the first run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import create_folder, remove_leftovers, write_files_atomically
from rtdetr_act.integrations.ultralytics.costs import time_training_step
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.shapes import SPLITS
from rtdetr_act.integrations.ultralytics.splits import list_images
from rtdetr_act.study.grid import (
    RunConfig,
    Study,
    check_runs,
    count_epochs,
    describe_difference,
    expand_study,
    find_splits,
    read_run_config,
)
from rtdetr_act.study.process import is_finished, read_result
from rtdetr_act.study.run_folders import read_run
from rtdetr_act.study.storage import (
    LATENCY_FILE,
    REPORT_FILES,
    RUN_FILE,
    RUNS_FOLDER,
    SNAPSHOT_FILE,
    STUDY_FILE,
    StudySettings,
    check_writable_files,
    encode_json,
    folder_exists,
)

_VALIDATION_COST = 0.4  # time of a validation image relative to a training image: forward pass and loss only
STARTUP_SECONDS = 10.0  # of a run: process, imports, model and final validation


def prepare_runs(study: Study, folder: Path, *, extra_files: Mapping[Path, Any] = MappingProxyType({})) -> list[Path]:
    """Check a study, and create the folders of its new runs; nothing is written if a check fails.

    Args:
        study: The study; it may extend the one in the folder.
        folder: Its folder, locked by the caller.
        extra_files: Plain data of further JSON files to write together with the runs, by path.

    Returns:
        The folders of all runs, in the order of `expand_study`.

    Raises:
        RtdetrActError: A run is not possible, or the folder holds another study.
    """
    runs, recorded = check_study(study, folder)
    check_writable_files(folder, [*REPORT_FILES, STUDY_FILE, LATENCY_FILE])
    contents = {path: encode_json(data) for path, data in extra_files.items()}
    new = {folder / RUNS_FOLDER / run.name: run for run in runs if run.name not in recorded}
    contents |= {path / RUN_FILE: encode_json(run.to_plain()) for path, run in new.items()}
    contents[folder / STUDY_FILE] = encode_json(asdict(StudySettings(study.baseline)))
    try:
        _remove_abandoned_files(folder)
        with ExitStack() as stack:  # removes new folders if something fails
            for path in new:
                stack.enter_context(create_folder(path))
            write_files_atomically(contents)
    except OSError as error:
        raise InputError(
            f"cannot write to {quote(str(folder))}: {error.strerror or error}; nothing was started"
        ) from None
    return [folder / RUNS_FOLDER / run.name for run in runs]


def _remove_abandoned_files(folder: Path) -> None:
    """Remove what a killed process left: run folders without a `run.json`, and snapshots of runs that are done."""
    for path in folder.glob(f"{RUNS_FOLDER}/*"):
        if path.is_dir() and not (path / RUN_FILE).exists():
            remove_leftovers(path / RUN_FILE)
            with suppress(OSError):  # not empty, so not left by this package
                path.rmdir()
        elif (path / SNAPSHOT_FILE).exists() and (result := read_result(path)) and result.state == "done":
            (path / SNAPSHOT_FILE).unlink()


def check_study(study: Study, folder: Path, *, read_only: bool = False) -> tuple[list[RunConfig], dict[str, RunConfig]]:
    """Check a study, and return its runs and those that its folder already holds, the latter by name.

    Args:
        study: The study.
        folder: Its folder, which need not exist.
        read_only: Do not generate the embedded data set in the user's cache.

    Raises:
        RtdetrActError: A run is not possible, or the folder holds another study or a damaged file.
    """
    runs = expand_study(study)
    recorded = read_run_configs(folder)
    if difference := describe_difference(runs, recorded):
        raise InputError(f"'{folder}' holds another study: {difference}; give another folder with output=")
    check_runs(runs, known=recorded, read_only=read_only)
    return runs, recorded


def read_run_configs(folder: Path) -> dict[str, RunConfig]:
    """Return the configurations of all runs in the folder of a study, by name.

    Raises:
        InputError: A file of a run is damaged, or belongs to another folder.
    """
    configs = {}
    for path in sorted(folder.glob(f"{RUNS_FOLDER}/*/{RUN_FILE}")) if folder_exists(folder) else []:
        record = read_run(path.parent)  # checks its result and attempts too, which the report reads later
        if record.name != path.parent.name:
            raise InputError(f"'{path}' belongs to the run {quote(record.name)}: move its folder out of the study")
        config = read_run_config(path.parent)
        assert config is not None
        configs[config.name] = config
    return configs


def is_study_finished(study: Study, folder: Path) -> bool:
    """Return whether all runs of a study have a result in its folder."""
    return folder_exists(folder) and all(is_finished(folder / RUNS_FOLDER / run.name) for run in expand_study(study))


def estimate_seconds(runs: Sequence[RunConfig], folder: Path, *, device: str) -> dict[str, float]:
    """Return the estimated duration of each run in seconds, by name; 0 for a finished run.

    The estimate is based on finished runs of the same variant, or else on training steps measured now.

    Args:
        runs: The runs.
        folder: Folder of the study, which need not exist.
        device: Torch device that runs train on, such as "cpu" or "cuda:0".

    Raises:
        RtdetrActError: A model cannot be trained on the device.
    """
    paces: dict[str, list[float]] = {}  # seconds per epoch by variant
    for run in runs:
        record = read_run(folder / RUNS_FOLDER / run.name) if is_finished(folder / RUNS_FOLDER / run.name) else None
        if record and not math.isnan(record.seconds_per_epoch):
            paces.setdefault(run.variant, []).append(record.seconds_per_epoch)
    for run in runs:
        if run.variant not in paces:
            paces[run.variant] = [_estimate_epoch_seconds(run, device)]
    return {
        run.name: 0.0
        if is_finished(folder / RUNS_FOLDER / run.name)
        else STARTUP_SECONDS + statistics.mean(paces[run.variant]) * count_epochs(run)
        for run in runs
    }


def _estimate_epoch_seconds(run: RunConfig, device: str) -> float:
    """Return the estimated duration of an epoch in seconds, from training steps measured on random images."""
    _, model = load_variant(run.model, run.activation, scope=run.scope, act_lr=run.act_lr)
    data = find_splits(run.data, str(model.task), read_only=True)
    train, val = (max(len(list_images(data[split])), 1) if split in data else count for split, count in SPLITS.items())
    batch = min(int(run.arguments.get("batch", 16)), train)
    step = time_training_step(model, int(run.arguments.get("imgsz", 640)), batch, device)
    return step / batch * (train + (val * _VALIDATION_COST if run.arguments.get("val", True) else 0))
