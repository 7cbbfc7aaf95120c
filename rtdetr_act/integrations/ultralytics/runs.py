"""Run a training, read what came out of it, and say in a sentence what went wrong."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.errors import (
    TrainingError,
)
from rtdetr_act.integrations.ultralytics.failures import explain, find_holder, find_roots, is_full, remove_empty
from rtdetr_act.integrations.ultralytics.results import read_results, read_scores
from rtdetr_act.integrations.ultralytics.trainers import started_here
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.sites import placed_activations


@dataclass(frozen=True)
class Outcome:
    """What training one variant gave.

    Attributes:
        activation: The plan as the user wrote it, or "stock".
        sites: Number of sites swapped.
        parameters: Parameters of the whole model.
        gflops: Floating-point operations of one image at the training size, in 1e9, activations included.
        scores: The two headline metrics of the task on the best checkpoint, such as {"mAP50": …, "mAP50-95": …}.
        seconds_per_epoch: Mean wall time of an epoch, validation included.
        folder: The run folder with Ultralytics' own files.
        failure: Why the run gave no result, else "".
    """

    activation: str
    sites: int = 0
    parameters: int = 0
    gflops: float = 0.0
    scores: dict[str, float] | None = None
    seconds_per_epoch: float = math.nan
    folder: Path | None = None
    failure: str = ""


def outcome_of(name: str, model: Any) -> Outcome:
    """Return what the training of an RTDETR or YOLO object gave, under the name of its activation."""
    return Outcome(
        activation=name,
        sites=count_sites(model),
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        gflops=count_gflops(model.model, model.trainer.args.imgsz),
        scores=read_scores(model.metrics),
        seconds_per_epoch=read_results(Path(model.trainer.save_dir)).seconds_per_epoch,
        folder=Path(model.trainer.save_dir),
    )


def run_training(model: Any, **arguments: Any) -> Any:
    """Train, and return Ultralytics' metrics; a run that fails before its first checkpoint leaves no folder.

    Raises:
        InputError: Ultralytics cannot use an argument or the data, or the run folder cannot be written.
        TrainingError: The loss became non-finite, or memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    model.add_callback("on_train_epoch_end", stop_at_non_finite_loss)
    model.add_callback("on_pretrain_routine_start", started_here)
    place = Path(str(arguments.get("project")), str(arguments.get("name")))
    resumed, started = bool(arguments.get("resume")), time.time()
    reused = resumed or (bool(arguments.get("exist_ok")) and place.exists())
    roots = find_roots(arguments)
    try:
        return model.train(**arguments)
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        trainer = find_holder(error)
        last = Path(trainer.last) if hasattr(trainer, "last") else None
        # The last.pt of a folder that is used again may be of the run before. File systems keep time to two seconds.
        begun = last is not None and last.exists() and (resumed or last.stat().st_mtime > started - 2)
        if trainer is not None and not reused and not begun:
            shutil.rmtree(trainer.save_dir, ignore_errors=True)
            remove_empty(Path(trainer.save_dir), roots)
        if isinstance(error, KeyboardInterrupt) or is_full(error):
            on = f"go on with: rtdetr-act resume {last}" if begun else "no epoch was finished"
            raise type(explained)(f"{explained}; {on}") from error
        if explained is error:
            raise
        raise explained from error


def stop_at_non_finite_loss(trainer: Any) -> None:
    """End a training whose loss is NaN or infinite after its first epoch, where Ultralytics would go on.

    From the second epoch on, Ultralytics goes back to the last checkpoint by itself, three times (8.3.220 does, 8.3.210
    did not).
    """
    recovers = hasattr(trainer, "_handle_nan_recovery") and trainer.epoch > trainer.start_epoch
    if not recovers and not bool(torch.isfinite(trainer.loss).all()):
        raise TrainingError(
            f"the loss became {float(trainer.loss.detach()):g} in epoch {trainer.epoch + 1} of {trainer.save_dir}: "
            "try a smaller lr0, another activation, or amp=False"
        )


def count_sites(model: Any) -> int:
    """Return how many sites of a model hold a swapped activation."""
    return sum(1 for _ in placed_activations(unwrap(model)))


def slug(text: str) -> str:
    """Turn a plan into a folder name: `leaky_relu(0.1)@0-9` becomes `leaky_relu-0.1-0-9`."""
    words = "".join(char if char.isalnum() or char in "._-" else " " for char in text).split()
    return "-".join(words)[:80]
