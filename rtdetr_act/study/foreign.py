"""Runs that Ultralytics made without us, as records: their plan is in the checkpoint, their scores in results.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.flops import count_gflops
from rtdetr_act.runs import STOCK, count_sites, load_model, read_epoch_time, read_scores
from rtdetr_act.study.records import Record
from rtdetr_act.ultralytics_hooks import plan_of

# Of Ultralytics' arguments, those that do not make another variant of a run.
_NO_VARIANT = frozenset(
    "name project save_dir exist_ok seed device workers verbose plots resume mode save save_period cache".split()
)


def read_foreign(folders: Sequence[Path], *, beside: Sequence[Path] = ()) -> list[Record]:
    """Return a record per run folder; what differs between their arguments makes the setting of each.

    Args:
        folders: Folders with an `args.yaml`.
        beside: Runs of studies that they will be shown with.
    """
    given = {path: arguments for path in [*beside, *folders] if (arguments := _read_arguments(path))}
    keys = sorted({key for arguments in given.values() for key in arguments} - _NO_VARIANT)
    varied = [key for key in keys if len({repr(arguments.get(key)) for arguments in given.values()}) > 1]
    return [
        _read(path, given.get(path, {}), " ".join(f"{key}={given.get(path, {}).get(key)}" for key in varied))
        for path in folders
    ]


def _read_arguments(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        return {}
    if isinstance(found.get("pretrained"), bool) and str(found.get("model")).endswith((".yaml", ".yml")):
        del found["pretrained"]  # there is nothing to take weights from, either way
    return found


def _read(folder: Path, arguments: Mapping[str, Any], setting: str) -> Record:
    rows = _read_scores(folder / "results.csv")
    best = max(rows, key=lambda row: row.get("mAP50-95", row.get("top1", -math.inf)), default={})
    record = Record(
        name=folder.name,
        variant=f"unknown {setting}".strip(),
        activation="unknown",
        setting=setting,
        seed=int(arguments.get("seed") or 0),
        state="failed",
        scores=best,
        epochs=len(rows),
        seconds_per_epoch=read_epoch_time(folder / "results.csv"),
        folder=folder,
        arguments=arguments,
    )
    weights = next((path for name in ("best.pt", "last.pt") if (path := folder / "weights" / name).is_file()), None)
    try:
        if weights is None:
            raise InputError("no checkpoint was saved")
        model = load_model(str(weights))
    except RtdetrActError as error:
        return replace(record, reason=str(error))
    activation = str(plan_of(model.model)) or STOCK
    checkpoint = model.ckpt or {}
    return replace(
        record,
        variant=f"{activation} {setting}".strip(),
        activation=activation,
        state="done" if checkpoint.get("epoch", -1) == -1 and best else "unfinished",
        sites=count_sites(model),
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        gflops=count_gflops(model.model, int(arguments.get("imgsz") or 640)),
        versions={"ultralytics": str(checkpoint.get("version", ""))},
    )


def _read_scores(results: Path) -> list[dict[str, float]]:
    """Return the headline scores of each epoch of a results.csv."""
    try:
        lines = results.read_text(encoding="utf-8").splitlines()
        rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
        return [read_scores(dict(zip(rows[0], row, strict=True))) for row in rows[1:]]
    except (OSError, IndexError, ValueError):
        return []
