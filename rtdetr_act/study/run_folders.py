"""Records of the runs below a folder: those of studies, and those of Ultralytics outside of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rtdetr_act.errors import InputError, quote
from rtdetr_act.integrations.ultralytics.results import read_results
from rtdetr_act.study.grid import format_activation, format_command, read_run_config
from rtdetr_act.study.process import read_attempts, read_result
from rtdetr_act.study.run_record import RunRecord, State
from rtdetr_act.study.storage import RUN_FILE, ScoreName, folder_exists
from rtdetr_act.study.ultralytics_runs import read_ultralytics_runs


def read_runs(folder: Path) -> list[RunRecord]:
    """Return a record of each run below a folder, sorted by path, those of studies first.

    A folder with `run.json` is a run of a study. A folder with Ultralytics' `args.yaml` only is a run outside of a
    study, whose activations are read from its checkpoint.

    Raises:
        InputError: The folder does not exist, has no run in it, or holds a damaged file.
    """
    if not folder_exists(folder):
        raise InputError(f"there is no folder {quote(str(folder))}")
    in_studies = sorted(path.parent for path in folder.rglob(RUN_FILE))
    others = sorted({path.parent for path in folder.rglob("args.yaml")} - set(in_studies))
    records = [read_run(path) for path in in_studies]
    records += read_ultralytics_runs(others, compared_with=in_studies)
    if not records:
        raise InputError(f"there is no run in '{folder}': give the folder of a study, or one with Ultralytics runs")
    return records


def read_run(folder: Path) -> RunRecord:
    """Return the record of a run of a study.

    Args:
        folder: The run folder.

    Raises:
        InputError: The folder has no `run.json`, or holds a damaged file.
    """
    config = read_run_config(folder)
    if config is None:
        raise InputError(f"there is no '{folder / RUN_FILE}'")
    result, attempts = read_result(folder), read_attempts(folder)
    state: State = result.state if result else "failed" if attempts else "unfinished"
    reason = result.reason if result else attempts[-1].reason if attempts else ""
    return RunRecord(
        name=config.name,
        variant=config.variant,
        activation=format_activation(config.activation),
        setting=config.setting,
        seed=config.seed,
        state=state,
        reason=reason,
        scores=_name_scores(result.scores) if result else {},
        classes=result.classes if result else {},
        precision=_or_nan(result.precision if result else None),
        recall=_or_nan(result.recall if result else None),
        averaged_scores=_name_scores(result.averaged_scores) if result else {},
        averaged_epochs=config.average_last if result and result.averaged_scores else 0,
        validation_share=_or_nan(result.validation_share if result else None),
        epochs=result.epochs if result else len(read_results(folder).epochs),
        sites=result.sites if result else 0,
        parameters=result.parameters if result else 0,
        gflops_640=result.gflops_640 if result else 0.0,
        seconds_per_epoch=_or_nan(result.seconds_per_epoch if result else None),
        folder=folder,
        arguments={"model": config.model, "data": config.data, **config.arguments, "seed": config.seed},
        versions=result.versions if result else {},
        command=format_command(config, folder),
    )


def _name_scores(scores: Mapping[ScoreName, float]) -> dict[str, float]:
    """Return scores by their names as text."""
    return {str(name): score for name, score in scores.items()}


def _or_nan(value: float | None) -> float:
    """Return a number, or NaN in place of None."""
    return math.nan if value is None else value
