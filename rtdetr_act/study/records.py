"""What a run folder tells: one record per run, of our studies and of Ultralytics runs made without us."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_act.errors import InputError, quote
from rtdetr_act.study.folder import ROW_FILE, is_folder
from rtdetr_act.study.grid import command_of, label, read_row
from rtdetr_act.study.process import read_attempts, read_result
from rtdetr_act.study.results import read_results

STATES = ("done", "failed", "stopped", "unfinished")


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        name: Of its folder, such as "arelu-s0".
        variant: All that tells it from others but the seed: "arelu", "dyrelu_b@backbone", "arelu lr0=0.01".
        activation: The plan, or "stock".
        setting: What a variant shares with the baseline it is compared with: the model and the values of listed
            arguments, such as "rtdetr-n lr0=0.01"; "" where the study varies the activation only.
        seed: Ultralytics' seed; runs of one seed are paired.
        state: "done", "failed" (gave no score), "stopped" (early, as hopeless), or "unfinished".
        reason: Why there are no scores; "" for a finished run.
        scores: The headline scores on the best checkpoint, {"mAP50": …, "mAP50-95": …} or {"top1": …, "top5": …}.
        classes: mAP50-95 of each class by its name; {} where it was not recorded.
        epochs: Epochs that were trained.
        sites: Activation sites swapped.
        parameters: Parameters of the model; 0 where unknown.
        gflops: Operations of one image at the training size, in 1e9; 0 where unknown.
        seconds_per_epoch: Mean wall time of an epoch, validation included; NaN where unknown.
        folder: The run folder.
        arguments: Ultralytics arguments that were set, seed included.
        versions: Of what it ran with, such as {"ultralytics": "8.4.190", "torch": "2.15.0", "device": "…"}.
        command: Command line that makes the same run again; "" for a run made without us.
    """

    name: str
    variant: str
    activation: str
    setting: str
    seed: int
    state: str
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    sites: int = 0
    parameters: int = 0
    gflops: float = 0.0
    seconds_per_epoch: float = float("nan")
    folder: Path = Path()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def read_records(folder: Path) -> list[Record]:
    """Return a record of each run below a folder, in the order of their paths.

    A folder with `run.json` is a run of a study; one with Ultralytics' `args.yaml` alone is a run made without us,
    whose activations are read from its checkpoint.

    Raises:
        InputError: There is no such folder, no run in it, or a record in it is damaged.
    """
    if not is_folder(folder):
        raise InputError(f"there is no folder {quote(str(folder))}")
    studied = sorted(path.parent for path in folder.rglob(ROW_FILE))
    others = sorted({path.parent for path in folder.rglob("args.yaml")} - set(studied))
    records = [read_run(path) for path in studied]
    if others:
        from rtdetr_act.study.foreign import read_foreign

        records += read_foreign(others, beside=studied)
    if not records:
        raise InputError(f"there is no run in '{folder}': give the folder of a study, or one with Ultralytics runs")
    return records


def read_run(folder: Path) -> Record:
    """Return the record of a run of a study; raises InputError where it has none, or a damaged one."""
    row = read_row(folder)
    if row is None:
        raise InputError(f"there is no '{folder / ROW_FILE}'")
    result, attempts = read_result(folder), read_attempts(folder)
    state = result.state if result else "failed" if attempts else "unfinished"
    reason = result.reason if result else attempts[-1].reason if attempts else ""
    seconds = result.seconds_per_epoch if result else None
    return Record(
        name=row.name,
        variant=row.variant,
        activation=label(row.activation),
        setting=row.setting,
        seed=row.seed,
        state=state,
        reason=reason,
        scores={str(name): score for name, score in result.scores.items()} if result else {},
        classes=result.classes if result else {},
        epochs=result.epochs if result else len(read_results(folder).epochs),
        sites=result.sites if result else 0,
        parameters=result.parameters if result else 0,
        gflops=result.gflops if result else 0.0,
        seconds_per_epoch=math.nan if seconds is None else seconds,
        folder=folder,
        arguments={"model": row.model, "data": row.data, **row.arguments, "seed": row.seed},
        versions=result.versions if result else {},
        command=command_of(row),
    )
