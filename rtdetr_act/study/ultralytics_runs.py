"""Records of Ultralytics runs outside of a study, from `args.yaml`, `results.csv` and the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.errors import InputError, RtdetrActError, quote
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.models import STOCK, load_model
from rtdetr_act.integrations.ultralytics.results import RESULTS_FILE, Results, read_results
from rtdetr_act.integrations.ultralytics.runs import count_sites
from rtdetr_act.study.decode import MAX_INT, is_json_value
from rtdetr_act.study.naming import name_values, to_single_line
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.yaml_files import read_yaml_mapping

# Ultralytics arguments that do not distinguish variants.
_IGNORED_ARGUMENTS = frozenset(
    "name project save_dir exist_ok seed device workers verbose plots resume mode save save_period cache".split()
)


def read_ultralytics_runs(folders: Sequence[Path], *, compared_with: Sequence[Path] = ()) -> list[RunRecord]:
    """Return a record per run folder of Ultralytics.

    The setting of each run consists of the arguments in which the runs differ. A run with a damaged file is a failed
    one, with the damage as its reason.

    Args:
        folders: Run folders with an `args.yaml`.
        compared_with: Run folders of studies shown in the same report, whose arguments are compared too.
    """
    read = {path: _read_arguments(path) for path in [*compared_with, *folders]}
    given = {path: arguments for path, (arguments, _) in read.items()}
    known = [given[path] for path, (_, reason) in read.items() if not reason]
    settings: dict[Path, list[str]] = {path: [] for path in given}
    for key in sorted({key for arguments in known for key in arguments} - _IGNORED_ARGUMENTS):
        # By their repr, which distinguishes values that print alike; name_values takes distinct values.
        values = {repr(arguments.get(key)): arguments.get(key) for arguments in known}
        if len(values) > 1:
            names = dict(zip(values, name_values(list(values.values())), strict=True))
            for path in settings:
                settings[path].append(f"{key}={names.get(repr(given[path].get(key)), 'unknown')}")
    return [_read_run(path, *read[path], " ".join(settings[path])) for path in folders]


def _read_arguments(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the arguments of a run, and a description of what is wrong with them or ""."""
    try:
        arguments = read_yaml_mapping(folder / "args.yaml")
        for key, value in arguments.items():
            if not is_json_value({key: value}):
                raise InputError(f"'{folder / 'args.yaml'}' has {quote(key)} {quote(value)}, which is not an argument")
        seed = arguments.get("seed") or 0
        if type(seed) is not int or not 0 <= seed <= MAX_INT:
            raise InputError(f"'{folder / 'args.yaml'}' has the seed {quote(seed)}, which is not a whole number")
        _check_image_size(arguments, folder)
    except InputError as error:
        return {}, str(error)
    if isinstance(arguments.get("pretrained"), bool) and str(arguments.get("model")).endswith((".yaml", ".yml")):
        del arguments["pretrained"]  # a model YAML has no weights, whatever the value
    return arguments, ""


def _check_image_size(arguments: Mapping[str, Any], folder: Path) -> None:
    """Check that the size of the training images is a number of pixels, or several; raises InputError."""
    given = arguments.get("imgsz") or 640
    sizes = given if isinstance(given, list) else [given]
    if not sizes or not all(type(size) is int and 0 < size <= 100_000 for size in sizes):
        raise InputError(f"'{folder / 'args.yaml'}' has imgsz {quote(given)}, which is not a number of pixels")


def _read_run(folder: Path, arguments: Mapping[str, Any], problem: str, setting: str) -> RunRecord:
    """Return the record of a run of Ultralytics.

    Args:
        folder: The run folder.
        arguments: Its arguments.
        problem: What is wrong with the arguments, or "".
        setting: Its setting, as in `RunRecord`.
    """
    results = read_results(folder)
    scored = [(epoch.score, epoch.scores) for epoch in results.epochs if epoch.score is not None]
    best = max(scored, key=lambda pair: pair[0], default=(0.0, {}))[1]
    record = RunRecord(
        name=folder.name,
        variant=f"unknown {setting}".strip(),
        activation="unknown",
        setting=setting,
        seed=int(arguments.get("seed") or 0),
        state="failed",
        scores=best,
        epochs=len(results.epochs),
        seconds_per_epoch=results.seconds_per_epoch,
        folder=folder,
        arguments=arguments,
    )
    weights = next((path for name in ("best.pt", "last.pt") if (path := folder / "weights" / name).is_file()), None)
    try:
        if problem:
            raise InputError(problem)
        if weights is None:
            raise InputError("no checkpoint was saved")
        model = load_model(str(weights))
        activation = to_single_line(str(read_plan(model.model))) or STOCK
        gflops = count_gflops(model.model)
    except RtdetrActError as error:
        return replace(record, reason=str(error))
    checkpoint = model.ckpt or {}
    return replace(
        record,
        variant=f"{activation} {setting}".strip(),
        activation=activation,
        state="done" if checkpoint.get("epoch", -1) == -1 and best else "unfinished",
        reason=_describe_damage(results, folder),
        sites=count_sites(model),
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        gflops_640=gflops,
        versions={"ultralytics": to_single_line(str(checkpoint.get("version", "")))},
    )


def _describe_damage(results: Results, folder: Path) -> str:
    """Return a sentence on missing or damaged lines of a results.csv, or ""."""
    if not results.epochs:
        return f"'{folder / RESULTS_FILE}' does not exist or has no line of numbers"
    if results.damaged:
        return (
            f"{format_count(results.damaged, 'line')} of '{folder / RESULTS_FILE}' cut short or damaged, and left out"
        )
    return ""
