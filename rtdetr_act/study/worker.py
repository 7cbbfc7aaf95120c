"""One run of a study, in a process of its own: `python -m rtdetr_act.study.worker FOLDER`.

It reads which row it is from `run.json`, trains, goes on from the snapshot where there is one, and writes `result.json`
last. Its standard input is a pipe that the study holds: when that closes, the study is gone, and so is this process,
which would otherwise train on beside its successor. A number that comes through it is that of the epochs after which a
run that pauses may go on.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import get_cpu_info

from rtdetr_act.errors import InputError, RtdetrActError, TrainingError
from rtdetr_act.integrations.ultralytics.datasets import resolve_data
from rtdetr_act.integrations.ultralytics.models import load_model, load_variant
from rtdetr_act.integrations.ultralytics.results import read_results, read_scores
from rtdetr_act.integrations.ultralytics.runs import outcome_of, run_training
from rtdetr_act.integrations.ultralytics.trainers import task_model
from rtdetr_act.study.activation_curves import sample_learned_curves
from rtdetr_act.study.grid import RunConfig, format_command, read_run_config
from rtdetr_act.study.process import is_finished
from rtdetr_act.study.snapshot import Snapshots
from rtdetr_act.study.storage import (
    CURVES_FILE,
    RESULT_FILE,
    RUN_FILE,
    SNAPSHOT_FILE,
    ActivationCurves,
    RunResult,
    SiteCurves,
    lock_folder,
    write_json,
)
from rtdetr_act.version import __version__

_WAIT = 30.0  # seconds for a predecessor, whose study was killed, to notice that


def main() -> None:
    """Do the run of the folder named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pauses", type=int, nargs="+", default=[])
    given = parser.parse_args()
    pauses = EpochBarrier(given.pauses)
    threading.Thread(target=_listen_for_releases, args=(pauses,), daemon=True).start()
    try:
        with lock_folder(given.folder, wait=_WAIT):
            if not is_finished(given.folder):
                row = read_run_config(given.folder)
                if row is None:
                    raise InputError(f"there is no '{given.folder / RUN_FILE}'")
                train_run(row, given.folder, device=given.device, threads=given.threads, pauses=pauses)
    except RtdetrActError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


class EpochBarrier:
    """Holds a training after some of its epochs until the study says that it may go on.

    Args:
        after: Numbers of epochs. A training that starts from a snapshot of such an epoch is held there too, since the
            process before it may have ended while it waited.
    """

    def __init__(self, after: Sequence[int]) -> None:
        self.epochs = frozenset(after)
        self._passed = 0
        self._changed = threading.Condition()

    def attach(self, model: Any) -> None:
        """Add the callbacks to an RTDETR or YOLO object, behind those that keep what an epoch left."""
        model.add_callback("on_train_start", lambda trainer: self._wait(trainer.start_epoch))
        model.add_callback("on_fit_epoch_end", lambda trainer: self._wait(trainer.epoch + 1))

    def release(self, epochs: int) -> None:
        """Let the training pass that number of epochs; called from another thread."""
        with self._changed:
            self._passed = max(self._passed, epochs)
            self._changed.notify_all()

    def _wait(self, epochs: int) -> None:
        if epochs in self.epochs:
            with self._changed:
                self._changed.wait_for(lambda: self._passed >= epochs)


def _listen_for_releases(pauses: EpochBarrier) -> None:
    """Pass on what the study says, and end with it."""
    said = b""
    while piece := os.read(0, 64):  # not sys.stdin, whose lock, held here, would abort the interpreter's own end
        *numbers, said = (said + piece).split(b"\n")
        for number in numbers:
            pauses.release(int(number))
    os._exit(1)  # no cleaning up: what is on the disk is whole at any moment


def train_run(row: RunConfig, folder: Path, *, device: str, threads: int, pauses: EpochBarrier) -> None:
    """Train the row and write what came out; a loss that became non-finite is an outcome too.

    Args:
        row: What to train.
        folder: The run folder, with what an earlier process left in it.
        device: Ultralytics' `device`; "" for the row's own.
        threads: Threads of torch; 0 for Ultralytics' own choice.
        pauses: Where it waits; not in a multi-GPU run, whose workers hear nothing of the study.

    Raises:
        RtdetrActError: The model, the data or an argument is wrong.
        OSError: The disk is full.
    """
    name, model = load_variant(row.model, row.activation, scope=row.scope, act_lr=row.act_lr)
    placed = {"device": device} if device else {}
    place = {"project": str(folder.parent.resolve()), "name": folder.name, "exist_ok": True}
    given = {**row.arguments, **place, "seed": row.seed, "data": resolve_data(row.data)}
    before: dict[str, Any] = {}
    if "," not in str(device or row.arguments.get("device")):
        _add_start_callbacks(model, before, threads)
        Snapshots(folder / SNAPSHOT_FILE).attach(model)
        pauses.attach(model)
    elif unfinished := _load_resumable(folder / "weights" / "last.pt"):
        # The workers of a multi-GPU run hold its state, out of reach of a snapshot: Ultralytics' own way to go on.
        model, given = unfinished, {"resume": True}
    try:
        run_training(model, **{**given, **placed})
        _check_batch(model.trainer.args.batch, row)
    except TrainingError as error:
        _write_result(folder, RunResult("failed", str(error), **_describe_environment(row, None)))
        return
    outcome = outcome_of(name, model)
    metrics = model.metrics or model.val(verbose=False, plots=False)  # those of a multi-GPU run stay in its workers
    _write_curves(folder, before, model)
    scores = read_scores(metrics)
    if unknown := [name for name, score in scores.items() if not math.isfinite(score)]:
        reason = f"Ultralytics' validation gives no number for {', '.join(unknown)}"
        _write_result(folder, RunResult("failed", reason, **_describe_environment(row, model.trainer.device)))
        return
    result = RunResult(
        state="done",
        scores=scores,  # type: ignore[arg-type]  # its names are those of Score
        classes=read_class_scores(metrics),
        epochs=len(read_results(folder).epochs),
        sites=outcome.sites,
        parameters=outcome.parameters,
        gflops=outcome.gflops,
        seconds_per_epoch=None if math.isnan(outcome.seconds_per_epoch) else outcome.seconds_per_epoch,
        **_describe_environment(row, model.trainer.device),
    )
    _write_result(folder, result)
    (folder / SNAPSHOT_FILE).unlink(missing_ok=True)


def _write_result(folder: Path, result: RunResult) -> None:
    write_json(folder / RESULT_FILE, asdict(result))


def _load_resumable(last: Path) -> Any:
    """Return the model of a checkpoint that a training can go on from, or None."""
    model = load_model(str(last)) if last.exists() else None
    return model if model and (model.ckpt or {}).get("epoch", -1) >= 0 else None


def _check_batch(used: int, row: RunConfig) -> None:
    """Refuse a run whose batch Ultralytics halved when memory ran out: it is no longer the same but the activation."""
    wanted = row.arguments.get("batch", DEFAULT_CFG_DICT["batch"])
    if used != wanted:
        raise TrainingError(
            f"memory ran out, and Ultralytics trained with batch={used}: choose a batch that all can hold"
        )


def _add_start_callbacks(model: Any, before: dict[str, Any], threads: int) -> None:
    """Set the threads, and note the activations before the first step; both know the trainer only in a callback."""

    def start(trainer: Any) -> None:
        if threads and trainer.device.type == "cpu":
            torch.set_num_threads(threads)  # Ultralytics sets its own number, before this callback

    def built(trainer: Any) -> None:
        before.update(sample_learned_curves(task_model(trainer.model)))

    model.add_callback("on_pretrain_routine_start", start)
    model.add_callback("on_pretrain_routine_end", built)


def _write_curves(folder: Path, before: dict[str, Any], model: Any) -> None:
    after = sample_learned_curves(model.model)["sites"]
    sites = [
        SiteCurves(
            name, site["activation"], _replace_non_finite(site["curve"]), _replace_non_finite(after[name]["curve"])
        )
        for name, site in before.get("sites", {}).items()
        if name in after
    ]
    if sites:
        write_json(folder / CURVES_FILE, asdict(ActivationCurves(before["x"], sites)), indent=None)


def _replace_non_finite(curve: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in curve]


def read_class_scores(metrics: Any) -> dict[str, float]:
    """Return mAP50-95 by class name, of the masks or keypoints where a task has them; {} for classification."""
    found = next((getattr(metrics, part) for part in ("seg", "pose", "box") if hasattr(metrics, part)), None)
    if found is None:
        return {}
    names = metrics.names
    scores = zip(found.ap_class_index, found.ap, strict=True)
    return {str(names[int(index)]): float(ap) for index, ap in scores if math.isfinite(ap)}


def _describe_environment(row: RunConfig, device: Any) -> dict[str, Any]:
    name = ""
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_name_processor()}"
    versions = {
        "rtdetr-act": __version__,
        "ultralytics": ultralytics.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": name,
    }
    return {"versions": {key: value for key, value in versions.items() if value}, "command": format_command(row)}


def _name_processor() -> str:
    return str(get_cpu_info())


if __name__ == "__main__":
    main()
