"""One run, as reports see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATES = ("done", "failed", "stopped", "unfinished")


@dataclass(frozen=True)
class RunRecord:
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
