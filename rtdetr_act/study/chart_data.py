"""What the charts of the page and the figures of a paper show: which variants, and their numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rtdetr_act.integrations.ultralytics.results import read_results
from rtdetr_act.study.leaderboard import LeaderboardRow, index_by_seed
from rtdetr_act.study.run_record import RunRecord

MAX_DRAWN = 12  # variants without the baselines: six colours with two line styles and symbols each


@dataclass(frozen=True)
class Curve:
    """A quantity over the epochs: mean, minimum and maximum over the finished runs of a variant, and their number."""

    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int


@dataclass(frozen=True)
class TrainingCurves:
    """Score and training loss over the epochs, by variant; variants of which nothing is known are left out."""

    scores: dict[str, Curve]
    losses: dict[str, Curve]


def select_drawn(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Return the best variants and the baselines they are compared with."""
    scored = [row for row in rows if math.isfinite(row.summary.mean)]
    others = [row for row in scored if not row.is_baseline]
    best = sorted(others, key=lambda row: -row.summary.mean)[:MAX_DRAWN]
    settings = {row.setting for row in best}
    names = {row.variant for row in best}
    names |= {row.variant for row in scored if row.is_baseline and (not best or row.setting in settings)}
    return [row for row in scored if row.variant in names]


def list_seed_differences(
    row: LeaderboardRow, baseline: str, runs: Mapping[str, Sequence[RunRecord]], metric: str
) -> dict[int, float]:
    """Return the difference of a variant to its baseline for each seed that both have finished, by seed.

    Args:
        row: The variant.
        baseline: Name of the variant that is its baseline.
        runs: Runs of each variant.
        metric: Name of the score.
    """
    own, reference = (index_by_seed(runs.get(name, ()), metric) for name in (row.variant, baseline))
    seeds = sorted(own.keys() & reference.keys())
    return {seed: own[seed].scores[metric] - reference[seed].scores[metric] for seed in seeds}


def choose_span(shown: Sequence[float], ends: Sequence[float]) -> tuple[list[float], bool]:
    """Return the range of an axis, and whether it cuts intervals off.

    Args:
        shown: Values that must be in it; NaN is ignored.
        ends: Ends of intervals, which widen it to three times the width of these at most.

    >>> choose_span([0.0, 1.0], [-0.5, 9.0])
    ([-0.625, 2.125], True)
    """
    values, wide = [list(filter(math.isfinite, each)) for each in (shown, ends)]
    low, high = min(values), max(values)
    room = high - low or max((high, *map(abs, wide)))
    start, end = max(low - room, min([low, *wide])), min(high + room, max([high, *wide]))
    pad = 0.05 * (end - start) or 0.001
    return [start - pad, end + pad], any(value < start or value > end for value in wide)


def choose_cost_span(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis of costs, on which variants of nearly equal cost appear close together."""
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), 0.04 * high)
    return max(0.0, low - pad), high + pad


def read_training_curves(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], metric: str
) -> TrainingCurves:
    """Return score and training loss over the epochs, from the results.csv of each finished run.

    Args:
        drawn: The variants.
        runs: Runs of each variant.
        metric: Name of the score.
    """
    histories = {
        row.variant: [_read_epochs(record.folder, metric) for record in runs[row.variant] if record.state == "done"]
        for row in drawn
    }
    return TrainingCurves(_make_curves(histories, 0), _make_curves(histories, 1))


def _make_curves(histories: Mapping[str, Sequence[Mapping[int, tuple[float, float]]]], part: int) -> dict[str, Curve]:
    """Return the curves of the score (part 0) or of the loss (1); variants without any value are left out."""
    curves = {
        name: _aggregate_runs([{epoch: pair[part] for epoch, pair in run.items()} for run in runs])
        for name, runs in histories.items()
    }
    return {name: curve for name, curve in curves.items() if curve.epochs}


def _read_epochs(folder: Path, metric: str) -> dict[int, tuple[float, float]]:
    """Return score and training loss of each epoch of a results.csv."""
    return {epoch.number: (epoch.scores.get(metric, math.nan), epoch.loss) for epoch in read_results(folder).epochs}


def _aggregate_runs(runs: Sequence[Mapping[int, float]]) -> Curve:
    """Return mean and range over runs of a quantity given by epoch; values that are not finite are ignored."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for epoch, value in run.items():
            if math.isfinite(value):
                values[epoch].append(value)
    epochs = sorted(values)
    return Curve(
        epochs,
        [round_digits(fmean(values[epoch])) for epoch in epochs],
        [round_digits(min(values[epoch])) for epoch in epochs],
        [round_digits(max(values[epoch])) for epoch in epochs],
        sum(bool(run) for run in runs),
    )


def round_digits(value: float) -> float:
    """Return a number with five significant digits, which reduces the size of the page to a third."""
    return float(f"{value:.5g}")
