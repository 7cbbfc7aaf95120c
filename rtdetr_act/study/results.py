"""Read the results.csv of a run, one line an epoch, whoever wrote it and however it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtdetr_act.integrations.ultralytics.runs import read_scores

RESULTS_FILE = "results.csv"


@dataclass(frozen=True)
class Epoch:
    """One line: the number of the epoch, the seconds since the start, the headline scores, the training loss.

    What is not there or not finite is NaN, and scores are left out.
    """

    number: int
    seconds: float
    scores: Mapping[str, float]
    loss: float

    @property
    def score(self) -> float | None:
        """The score that runs are ranked by, or None."""
        return self.scores.get("mAP50-95", self.scores.get("top1"))


@dataclass(frozen=True)
class Results:
    """What a results.csv holds.

    Attributes:
        epochs: Its lines, those that are whole.
        damaged: How many others it has: cut short, or not numbers.
    """

    epochs: tuple[Epoch, ...] = ()
    damaged: int = 0

    @property
    def seconds_per_epoch(self) -> float:
        """Mean seconds of an epoch, validation included; NaN where there are no times, as in Ultralytics 8.3.0."""
        return self.epochs[-1].seconds / len(self.epochs) if self.epochs else math.nan


def read_results(folder: Path) -> Results:
    """Return what the results.csv of a folder holds; nothing where there is none, or it is no table."""
    try:
        text = (folder / RESULTS_FILE).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return Results()
    # The last line of a file that ends without a line break was being written when its process ended.
    header, *lines = [line for line in text.split("\n")[:-1] if line.strip()] or [""]
    names = [name.strip() for name in header.split(",")]
    cut = int(bool(text.rpartition("\n")[2].strip()))
    if "epoch" not in names:
        return Results(damaged=len(lines) + cut + bool(header.strip()))
    found = [_read_line(names, line) for line in lines]
    epochs = tuple(epoch for epoch in found if epoch)
    return Results(epochs, len(found) - len(epochs) + cut)


def _read_line(names: list[str], line: str) -> Epoch | None:
    cells = line.split(",")
    if len(cells) != len(names):
        return None
    try:
        # A blank cell is a value that was not measured in this epoch.
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
