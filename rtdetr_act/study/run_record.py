"""Outcome of one run, in the form that reports use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

State = Literal["done", "failed", "stopped", "unfinished"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class RunRecord:
    """Outcome of one run of a study.

    Attributes:
        name: Name of its folder, such as "arelu-s0".
        variant: Name shared by runs that differ in the seed only: "arelu", "dyrelu_b@backbone", "arelu lr0=0.01".
        activation: The plan, or "stock".
        setting: Name shared by a variant and the baseline it is compared with: the model and the values of varied
            arguments, such as "rtdetr-n lr0=0.01"; "" if only the activation varies.
        seed: Ultralytics' `seed`; runs with equal seeds are paired.
        state: "done", "failed" (without scores), "stopped" (early, by halving), or "unfinished".
        reason: Why there are no scores; "" for a finished run.
        scores: Scores of the best checkpoint as fractions of 1, {"mAP50": …, "mAP50-95": …} or {"top1": …, "top5": …}.
        classes: mAP50-95 by class name; {} if it was not recorded.
        precision, recall: Means over the classes at the confidence where their harmonic mean is largest, at an IoU of
            0.5; NaN if they were not recorded.
        averaged_scores: Scores of the mean weights of the last epochs, named as in `scores`; {} if there are none.
        averaged_epochs: Number of epochs that these are the mean of; 0 if there are none.
        validation_share: Validation images per training image, of a run whose seed divides the images; NaN otherwise.
        epochs: Number of epochs trained.
        sites: Number of activation sites swapped.
        parameters: Number of parameters of the model; 0 if unknown.
        gflops_640: Operations of one image of 640 x 640 pixels, in 1e9; 0 if unknown.
        seconds_per_epoch: Mean wall time of an epoch, validation included; NaN if unknown.
        folder: The run folder.
        arguments: Ultralytics arguments that were set, seed included.
        versions: Versions of the software, and the device, such as {"ultralytics": "8.4.190", "device": "…"}.
        command: Command line that repeats the run; "" for a run of Ultralytics outside of a study.
    """

    name: str
    variant: str
    activation: str
    setting: str
    seed: int
    state: State
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, float] = field(default_factory=dict)
    precision: float = float("nan")
    recall: float = float("nan")
    averaged_scores: Mapping[str, float] = field(default_factory=dict)
    averaged_epochs: int = 0
    validation_share: float = float("nan")
    epochs: int = 0
    sites: int = 0
    parameters: int = 0
    gflops_640: float = 0.0
    seconds_per_epoch: float = float("nan")
    folder: Path = Path()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def list_values(records: Sequence[RunRecord], name: str) -> list[str]:
    """Return the values of an argument that were set in some runs, each once."""
    found = {str(record.arguments[name]) for record in records if record.arguments.get(name)}
    return sorted(found, key=lambda value: (len(value), value))
