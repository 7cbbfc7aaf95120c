"""Run a training of Ultralytics, and read its outcome."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.errors import TrainingError
from rtdetr_act.integrations.ultralytics.failures import (
    existing_folders,
    find_engine,
    is_write_error,
    remove_empty_folders,
    translate,
)
from rtdetr_act.integrations.ultralytics.results import format_scores, read_results, read_scores
from rtdetr_act.integrations.ultralytics.trainers import started_here
from rtdetr_act.results import Result
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.sites import iterate_placed_activations


@dataclass(frozen=True, repr=False)
class Outcome(Result):
    """Outcome of the training of one variant.

    Attributes:
        activation: The plan as the user wrote it, or "stock".
        sites: Number of sites whose activation was swapped.
        parameters: Number of parameters of the whole model.
        gflops_640: Floating-point operations of one image of 640 x 640 pixels, activations included, in 1e9.
        scores: The two headline scores of the task on the best checkpoint, such as {"mAP50": …, "mAP50-95": …}; None
            for a training that failed.
        seconds_per_epoch: Mean wall time of an epoch, validation included, in seconds; NaN where it is not known.
        folder: The run folder with Ultralytics' own files; None for a training that failed.
        failure: Why the training failed, in one sentence; "" if it did not.
    """

    activation: str
    sites: int = 0
    parameters: int = 0
    gflops_640: float = 0.0
    scores: dict[str, float] | None = None
    seconds_per_epoch: float = math.nan
    folder: Path | None = None
    failure: str = ""

    def _summarise(self) -> str:
        """Return the activation, and its scores or why there are none."""
        scores = format_scores(self.scores)
        return ", ".join([self.activation, *([f"failed: {self.failure}"] if self.failure else scores)])


def outcome_of(name: str, model: Any) -> Outcome:
    """Return the outcome of a finished training.

    Args:
        name: Name of the variant, such as its activation.
        model: RTDETR or YOLO object that was trained in this process.
    """
    return Outcome(
        activation=name,
        sites=count_sites(model),
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        gflops_640=count_gflops(model.model),
        scores=read_scores(model.metrics),
        seconds_per_epoch=read_results(Path(model.trainer.save_dir)).seconds_per_epoch,
        folder=Path(model.trainer.save_dir),
    )


def run_training(model: Any, **arguments: Any) -> Any:
    """Train a model; a run that fails before its first checkpoint leaves no folder behind.

    Args:
        model: RTDETR or YOLO object.
        **arguments: Ultralytics' arguments of `train`.

    Returns:
        Ultralytics' metrics of the best checkpoint.

    Raises:
        InputError: Ultralytics cannot use an argument or the data, or the run folder cannot be written.
        TrainingError: The loss became non-finite, or memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    model.add_callback("on_train_epoch_end", stop_at_non_finite_loss)
    model.add_callback("on_pretrain_routine_start", started_here)
    folder = Path(str(arguments.get("project")), str(arguments.get("name")))
    resumed, started = bool(arguments.get("resume")), time.time()
    reused = resumed or (bool(arguments.get("exist_ok")) and folder.exists())
    existing = existing_folders(arguments)
    try:
        return model.train(**arguments)
    except (Exception, KeyboardInterrupt) as error:
        translated = translate(error)
        if translated is None:
            raise
        trainer = find_engine(error)
        last = Path(trainer.last) if hasattr(trainer, "last") else None
        # The last.pt of a folder that is used again may be of an earlier run. FAT stores times in steps of two seconds.
        resumable = last is not None and last.exists() and (resumed or last.stat().st_mtime > started - 2)
        if trainer is not None and not reused and not resumable:
            shutil.rmtree(trainer.save_dir, ignore_errors=True)
            remove_empty_folders(Path(trainer.save_dir), existing)
        if isinstance(error, KeyboardInterrupt) or is_write_error(error):
            advice = f"go on with: rtdetr-act resume {last}" if resumable else "no epoch was finished"
            raise type(translated)(f"{translated}; {advice}") from error
        if translated is error:
            raise
        raise translated from error


def stop_at_non_finite_loss(trainer: Any) -> None:
    """Stop a training whose loss is NaN or infinite after an epoch that Ultralytics cannot recover from.

    From the second epoch on, newer releases restore the last checkpoint themselves, three times (8.3.220 does, 8.3.210
    did not).

    Raises:
        TrainingError: The loss is not finite.
    """
    recovers = hasattr(trainer, "_handle_nan_recovery") and trainer.epoch > trainer.start_epoch
    if not recovers and not bool(torch.isfinite(trainer.loss).all()):
        raise TrainingError(
            f"the loss became {float(trainer.loss.detach()):g} in epoch {trainer.epoch + 1} of {trainer.save_dir}: "
            "try a smaller lr0, another activation, or amp=False"
        )


def count_sites(model: Any) -> int:
    """Return the number of sites of a model whose activation was swapped."""
    return sum(1 for _ in iterate_placed_activations(unwrap(model)))


def slug(text: str) -> str:
    """Return a folder name for a plan, of 80 characters at most.

    >>> slug("leaky_relu(0.1)@0-9")
    'leaky_relu-0.1-0-9'
    """
    words = "".join(char if char.isalnum() or char in "._-" else " " for char in text).split()
    return "-".join(words)[:80]
