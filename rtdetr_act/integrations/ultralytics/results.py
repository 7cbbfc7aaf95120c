"""Read what Ultralytics reports of a training: `results.csv` and the metrics of a validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.csv"


@dataclass(frozen=True)
class Epoch:
    """One line of a results.csv.

    Attributes:
        number: Number of the epoch, counted from 1.
        seconds: Seconds since the start of the training; NaN where they are not recorded.
        scores: Headline scores as `read_scores` returns them; those that are missing or not finite are left out.
        loss: Sum of all parts of the training loss; NaN where it is not recorded.
    """

    number: int
    seconds: float
    scores: Mapping[str, float]
    loss: float

    @property
    def score(self) -> float | None:
        """The score that runs are ranked by, mAP50-95 or top1; None where the epoch has neither."""
        return self.scores.get("mAP50-95", self.scores.get("top1"))


@dataclass(frozen=True)
class Results:
    """Contents of a results.csv.

    Attributes:
        epochs: Its complete lines, in the order of the file.
        damaged: Number of lines that are truncated or not numeric.
    """

    epochs: tuple[Epoch, ...] = ()
    damaged: int = 0

    @property
    def seconds_per_epoch(self) -> float:
        """Mean seconds of an epoch, validation included; NaN without times, which Ultralytics 8.3.0 did not record."""
        return self.epochs[-1].seconds / len(self.epochs) if self.epochs else math.nan


def read_results(folder: Path) -> Results:
    """Return the contents of the results.csv in a run folder.

    The file may be missing, damaged or still being written.

    Args:
        folder: Run folder of Ultralytics.

    Returns:
        The epochs; none if there is no such file or it is not a table of epochs.
    """
    try:
        text = (folder / RESULTS_FILE).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return Results()
    # A last line without a line break was being written when its process ended.
    header, *lines = [line for line in text.split("\n")[:-1] if line.strip()] or [""]
    names = [name.strip() for name in header.split(",")]
    truncated = int(bool(text.rpartition("\n")[2].strip()))
    if "epoch" not in names:
        return Results(damaged=len(lines) + truncated + bool(header.strip()))
    parsed = [_parse_line(names, line) for line in lines]
    epochs = tuple(epoch for epoch in parsed if epoch)
    return Results(epochs, len(parsed) - len(epochs) + truncated)


def _parse_line(names: list[str], line: str) -> Epoch | None:
    """Return the epoch of a line, or None if the line is damaged."""
    cells = line.split(",")
    if len(cells) != len(names):
        return None
    try:
        # An empty cell is a value that was not measured in this epoch.
        values = dict(zip(names, (float(cell) if cell.strip() else math.nan for cell in cells), strict=True))
    except ValueError:
        return None
    number = values["epoch"]
    if not math.isfinite(number):
        return None
    losses = [value for name, value in values.items() if name.startswith("train/")]
    return Epoch(
        number=int(number),
        seconds=values.get("time", math.nan),
        scores={name: score for name, score in read_scores(values).items() if math.isfinite(score)},
        loss=sum(losses) if losses else math.nan,
    )


def format_scores(scores: Mapping[str, float] | None) -> list[str]:
    """Return scores as text, one by one; none for None.

    >>> format_scores({"mAP50": 0.75, "mAP50-95": 0.5})
    ['mAP50 0.7500', 'mAP50-95 0.5000']
    """
    return [f"{name} {score:.4f}" for name, score in (scores or {}).items()]


def list_score_names(scores: Iterable[Mapping[str, float] | None]) -> list[str]:
    """Return the names of all scores of several models, in their order; None stands for a model without any.

    >>> list_score_names([{"mAP50": 0.75}, None, {"mAP50": 0.5, "mAP50-95": 0.25}])
    ['mAP50', 'mAP50-95']
    """
    return list(dict.fromkeys(name for each in scores for name in each or {}))


def read_scores(metrics: Any) -> dict[str, float]:
    """Return the two headline scores of Ultralytics metrics, as fractions of 1.

    Segmentation and pose models have box scores too; their own mask or keypoint scores come last in Ultralytics'
    dictionary and are the ones returned.

    Args:
        metrics: Metrics object of a validation, or its `results_dict`, or a line of a results.csv as a dictionary.

    Returns:
        {"mAP50": …, "mAP50-95": …}, or {"top1": …, "top5": …} for classification.
    """
    return _select_metrics(metrics, ("mAP50", "mAP50-95", "top1", "top5"))


def read_precision_and_recall(metrics: Any) -> dict[str, float]:
    """Return precision and recall of Ultralytics metrics, as fractions of 1, of masks or keypoints if there are any.

    They are means over the classes at the confidence where F1 is largest, at an IoU of 0.5.

    Args:
        metrics: Metrics object of a validation, or its `results_dict`.

    Returns:
        {"precision": …, "recall": …}; {} for classification.
    """
    return _select_metrics(metrics, ("precision", "recall"))


def _select_metrics(metrics: Any, names: Sequence[str]) -> dict[str, float]:
    """Return Ultralytics metrics with some names; of several with one name, the last."""
    values = metrics if isinstance(metrics, dict) else getattr(metrics, "results_dict", {})
    found = {
        key.removeprefix("metrics/").split("(")[0].removeprefix("accuracy_"): value for key, value in values.items()
    }
    return {name: float(found[name]) for name in found if name in names}
