"""Worker process of one run of a study: `python -m rtdetr_act.study.worker FOLDER`.

The worker reads its configuration from `run.json`, trains, resuming from a snapshot if there is one, and writes
`result.json` last. Its standard input is a pipe from the process of the study. When the pipe closes, the study has
ended, and the worker exits so as not to compete with a successor. A number of epochs read from the pipe releases a run
that pauses after so many epochs.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import get_cpu_info

from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, TrainingError
from rtdetr_act.evaluation.detection_files import encode_detections, encode_scores
from rtdetr_act.files import write_files_atomically
from rtdetr_act.formatting import finite_or_none
from rtdetr_act.integrations.ultralytics.datasets import resolve_data
from rtdetr_act.integrations.ultralytics.detections import collect_detections
from rtdetr_act.integrations.ultralytics.models import load_model, load_variant
from rtdetr_act.integrations.ultralytics.results import read_precision_and_recall, read_results, read_scores
from rtdetr_act.integrations.ultralytics.runs import outcome_of, run_training
from rtdetr_act.integrations.ultralytics.splits import LabelCacheLock, split_data
from rtdetr_act.integrations.ultralytics.trainers import task_model
from rtdetr_act.study.activation_curves import SampledCurves, sample_learned_curves
from rtdetr_act.study.averaging import RecentWeights, score_average
from rtdetr_act.study.grid import SPLIT_FILE, RunConfig, format_command, read_run_config
from rtdetr_act.study.process import is_finished
from rtdetr_act.study.snapshot import Snapshots
from rtdetr_act.study.storage import (
    CURVES_FILE,
    DETECTIONS_FILE,
    RESULT_FILE,
    RUN_FILE,
    SCORES_FILE,
    SNAPSHOT_FILE,
    WORKER_EXIT_SECONDS,
    ActivationCurves,
    RunResult,
    SiteCurves,
    lock_folder,
    write_json,
)
from rtdetr_act.version import __version__

# Arguments of a training that its validations heed.
_VALIDATION_ARGUMENTS = frozenset(
    "agnostic_nms batch cache classes conf half imgsz iou max_det rect single_cls split workers".split()
)


def main() -> None:
    """Train the run of the folder given on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pauses", type=int, nargs="+", default=[])
    given = parser.parse_args()
    barrier = EpochBarrier(given.pauses)
    threading.Thread(target=_listen_for_releases, args=(barrier,), daemon=True).start()
    try:
        with lock_folder(given.folder, timeout=WORKER_EXIT_SECONDS):
            if not is_finished(given.folder):
                config = read_run_config(given.folder)
                if config is None:
                    raise InputError(f"'{given.folder / RUN_FILE}' does not exist")
                train_run(config, given.folder, device=given.device, threads=given.threads, barrier=barrier)
    except RtdetrActError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


class EpochBarrier:
    """Pauses a training after some of its epochs until it is released.

    Args:
        epochs: Numbers of epochs to pause after. A training that resumes from a snapshot of such an epoch pauses too,
            since the previous process may have ended during the pause.
    """

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs = frozenset(epochs)
        self._released = 0
        self._changed = threading.Condition()

    def attach(self, model: Any) -> None:
        """Add the callbacks to an RTDETR or YOLO model, after those that save a snapshot."""
        model.add_callback("on_train_start", lambda trainer: self._wait(trainer.start_epoch))
        model.add_callback("on_fit_epoch_end", lambda trainer: self._wait(trainer.epoch + 1))

    def release(self, epochs: int) -> None:
        """Let the training continue beyond a number of epochs; called from another thread."""
        with self._changed:
            self._released = max(self._released, epochs)
            self._changed.notify_all()

    def _wait(self, epochs: int) -> None:
        """Wait until the training is released beyond a number of epochs, if it pauses there."""
        if epochs in self.epochs:
            with self._changed:
                self._changed.wait_for(lambda: self._released >= epochs)


def _listen_for_releases(barrier: EpochBarrier) -> None:
    """Release the barrier for each number read from the standard input, and exit when that closes."""
    rest = b""
    while piece := os.read(0, 64):  # not sys.stdin, whose lock would abort the shutdown of the interpreter
        *numbers, rest = (rest + piece).split(b"\n")
        for number in numbers:
            barrier.release(int(number))
    os._exit(1)  # without cleanup: all files are complete at any moment


def train_run(config: RunConfig, folder: Path, *, device: str, threads: int, barrier: EpochBarrier) -> None:
    """Train a run and write its result; a training with a non-finite loss has the result "failed".

    Args:
        config: Configuration of the run.
        folder: The run folder, with the files of earlier attempts.
        device: Ultralytics' `device`; "" for that of the configuration.
        threads: Number of torch threads; 0 for Ultralytics' default.
        barrier: Pauses of the training; ignored by a multi-GPU run, whose processes are out of reach.

    Raises:
        RtdetrActError: The model, the data or an argument is invalid.
        OSError: The disk is full.
    """
    name, model = load_variant(config.model, config.activation, scope=config.scope, act_lr=config.act_lr)
    device_argument = {"device": device} if device else {}
    location = {"project": str(folder.parent.resolve()), "name": folder.name, "exist_ok": True}
    data = RunData(config, str(model.task), folder)
    arguments = {**config.arguments, **location, "seed": config.seed, "data": data.source}
    before: list[SampledCurves] = []  # the curves before the first step, once they are sampled
    recent = RecentWeights(config.average_last) if config.average_last else None
    if "," not in str(device or config.arguments.get("device")):
        _add_start_callbacks(model, before, threads)
        data.attach(model)
        if recent:
            recent.attach(model)
        Snapshots(folder / SNAPSHOT_FILE, recent).attach(model)
        barrier.attach(model)
    elif unfinished := _load_resumable(folder / "weights" / "last.pt"):
        # The state of a multi-GPU run is in its own processes, out of reach of a snapshot: Ultralytics resumes it.
        model, arguments = unfinished, {"resume": True}
    try:
        run_training(model, **{**arguments, **device_argument})
        _check_batch(model.trainer.args.batch, config)
    except TrainingError as error:
        _write_result(folder, RunResult("failed", str(error), **_describe_environment(config, None)))
        return
    outcome = outcome_of(name, model)
    metrics = model.metrics or model.val(
        verbose=False, plots=False
    )  # a multi-GPU run leaves its metrics in its processes
    _write_curves(folder, before, model)
    _write_detections(folder, config, data, model, threads)
    scores = read_scores(metrics)
    if missing := [name for name, score in scores.items() if not math.isfinite(score)]:
        reason = f"Ultralytics' validation returned no finite {', '.join(missing)}"
        _write_result(folder, RunResult("failed", reason, **_describe_environment(config, model.trainer.device)))
        return
    headline, classes = read_precision_and_recall(metrics), read_class_scores(metrics)
    result = RunResult(
        state="done",
        scores=scores,  # type: ignore[arg-type]  # its keys are ScoreName
        classes=classes,
        precision=finite_or_none(headline.get("precision")),
        recall=finite_or_none(headline.get("recall")),
        averaged_scores=_score_average(model, recent) if recent else {},  # last: it changes the metrics
        validation_share=data.validation_share,
        epochs=len(read_results(folder).epochs),
        sites=outcome.sites,
        parameters=outcome.parameters,
        gflops_640=outcome.gflops_640,
        seconds_per_epoch=None if math.isnan(outcome.seconds_per_epoch) else outcome.seconds_per_epoch,
        **_describe_environment(config, model.trainer.device),
    )
    _write_result(folder, result)
    (folder / SNAPSHOT_FILE).unlink(missing_ok=True)


class RunData:
    """The data set of a run, whose seed may divide its images.

    Args:
        config: Configuration of the run.
        task: Task of the model.
        folder: The run folder.

    Attributes:
        source: Ultralytics' `data` argument.
        validation_share: Validation images per training image where the seed divides them; None otherwise.
        lock: Held while labels are read; None where all runs have the same images.
    """

    def __init__(self, config: RunConfig, task: str, folder: Path) -> None:
        self.source = resolve_data(config.data)
        self.validation_share: float | None = None
        self.lock: LabelCacheLock | None = None
        if config.split_seeds:
            self.lock = LabelCacheLock(self.source)
            split = split_data(self.source, task, config.seed, folder / SPLIT_FILE.parent)
            self.source, self.validation_share = str(split.data), split.val / split.train

    def attach(self, model: Any) -> None:
        """Let a training hold the lock while it reads labels."""
        if self.lock:
            self.lock.attach(model)

    def hold(self) -> AbstractContextManager[object]:
        """Return a context in which labels are read."""
        return self.lock.lock if self.lock else nullcontext()


def _write_result(folder: Path, result: RunResult) -> None:
    """Write the result of a run."""
    write_json(folder / RESULT_FILE, asdict(result))


def _load_resumable(last: Path) -> Any:
    """Return the model of a checkpoint that a training can resume from, or None."""
    model = load_model(str(last)) if last.exists() else None
    return model if model and (model.ckpt or {}).get("epoch", -1) >= 0 else None


def _check_batch(used: int, config: RunConfig) -> None:
    """Raise TrainingError if Ultralytics reduced the batch for lack of memory: the runs are then not comparable."""
    if used != config.arguments.get("batch", DEFAULT_CFG_DICT["batch"]):
        raise TrainingError(
            f"memory ran out, and Ultralytics trained with batch={used}: choose a batch that fits for all variants"
        )


def _add_start_callbacks(model: Any, before: list[SampledCurves], threads: int) -> None:
    """Add callbacks that set the number of threads, and sample the activations before the first step.

    Args:
        model: RTDETR or YOLO model.
        before: List to which the curves are appended.
        threads: Number of torch threads on a CPU; 0 for Ultralytics' default.
    """

    def sample(trainer: Any) -> None:
        before.append(sample_learned_curves(task_model(trainer.model)))

    model.add_callback("on_pretrain_routine_start", lambda trainer: _set_threads(trainer.device, threads))
    model.add_callback("on_pretrain_routine_end", sample)


def _score_average(model: Any, recent: RecentWeights) -> dict[Any, float]:
    """Return the scores of the mean weights of the last epochs; {} if one is not finite."""
    scores: dict[Any, float] = {}
    with _keeping_the_run("the weights of the last epochs were not averaged, and the report names this run"):
        scores = score_average(model.trainer, recent)
    return scores if all(map(math.isfinite, scores.values())) else {}


@contextmanager
def _keeping_the_run(lost: str) -> Iterator[None]:
    """Print an error and what is lost by it, in place of raising it: a training and its scores are not lost with it."""
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        traceback.print_exc()
        print(f"warning: {lost}")


def _write_detections(folder: Path, config: RunConfig, data: RunData, model: Any, threads: int) -> None:
    """Write what the best checkpoint of a detector finds on the validation images, and its scores on resamples of them.

    Args:
        folder: The run folder.
        config: Configuration of the run.
        data: Its data set.
        model: RTDETR or YOLO object after the training.
        threads: Number of torch threads on a CPU; 0 for Ultralytics' default.
    """
    best = folder / "weights" / "best.pt"
    if model.task != "detect" or not best.exists():
        return
    device = model.trainer.device
    settings = {key: value for key, value in config.arguments.items() if key in _VALIDATION_ARGUMENTS}
    settings |= {"data": data.source, "device": str(device)}
    trained = load_model(str(best))
    trained.add_callback("on_val_start", lambda _: _set_threads(device, threads))
    contents: dict[str, bytes] = {}
    with _keeping_the_run("the detections were not kept, and the report leaves this run out of its bootstrap"):
        with data.hold():
            truth, found = collect_detections(trained, **settings)
        contents = {DETECTIONS_FILE: encode_detections(truth, found), SCORES_FILE: encode_scores(truth, found)}
    write_files_atomically({folder / name: content for name, content in contents.items()})


def _set_threads(device: Any, threads: int) -> None:
    """Set the number of torch threads on a CPU, in place of the number that Ultralytics sets before."""
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)


def _write_curves(folder: Path, before: Sequence[SampledCurves], model: Any) -> None:
    """Write the curves of learned activations before and after training, if there are any."""
    if not before:
        return
    start, end = before[-1], sample_learned_curves(model.model)
    sites = [
        SiteCurves(name, start.classes[name], _replace_non_finite(values), _replace_non_finite(end.values[name]))
        for name, values in start.values.items()
        if name in end.values
    ]
    if sites:
        write_json(folder / CURVES_FILE, asdict(ActivationCurves(start.x, sites)), indent=None)


def _replace_non_finite(curve: Sequence[float]) -> list[float | None]:
    """Return numbers with None for those that are not finite."""
    return [value if math.isfinite(value) else None for value in curve]


def read_class_scores(metrics: Any) -> dict[str, float]:
    """Return mAP50-95 by class name, of masks or keypoints if the task has them; {} for classification.

    Args:
        metrics: Ultralytics metrics of a validation.
    """
    part = next((getattr(metrics, name) for name in ("seg", "pose", "box") if hasattr(metrics, name)), None)
    if part is None:
        return {}
    names = metrics.names
    scores = zip(part.ap_class_index, part.ap, strict=True)
    return {str(names[int(index)]): float(ap) for index, ap in scores if math.isfinite(ap)}


def _describe_environment(config: RunConfig, device: Any) -> dict[str, Any]:
    """Return the fields `versions` and `command` of a result; `device` is None if it is unknown."""
    name = ""
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {get_cpu_info()}"
    versions = {
        "rtdetr-act": __version__,
        "ultralytics": ultralytics.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": name,
    }
    known = {key: value for key, value in versions.items() if value}
    return {"versions": known, "command": format_command(config, Path(config.name))}


if __name__ == "__main__":
    main()
