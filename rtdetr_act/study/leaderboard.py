"""The leaderboard: one row per variant, with its spread and its difference to the baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TypeVar

from rtdetr_act.errors import InputError
from rtdetr_act.evaluation.bootstrap import (
    HEADLINES,
    Scores,
    compare_over_images,
    compare_over_seeds_and_images,
)
from rtdetr_act.evaluation.detection_files import RunScores, select_scores
from rtdetr_act.evaluation.differences import has_learned_nothing
from rtdetr_act.evaluation.statistics import (
    Comparison,
    Conclusion,
    Difference,
    Summary,
    compare,
    conclude,
    summarise_scores,
)
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result
from rtdetr_act.study.run_record import RunRecord

K = TypeVar("K")


@dataclass(frozen=True)
class AveragedScores:
    """Scores of the mean weights of the last epochs.

    Attributes:
        epochs: Number of epochs.
        summary: Statistics of the ranked score over the finished runs that have it.
        comparison: Difference to the baseline, as that of `LeaderboardRow`; None where there is none.
    """

    epochs: int
    summary: Summary
    comparison: Comparison | None


@dataclass(frozen=True, repr=False)
class LeaderboardRow(Result):
    """One variant in the leaderboard.

    Attributes:
        variant: Its name, such as "arelu lr0=0.01".
        activation: The plan, or "stock".
        setting: As in `RunRecord`.
        is_baseline: Whether other variants of the same setting are compared with it.
        summary: Mean, standard deviation and confidence interval of the ranked score over its finished runs.
        other_scores: Means of the other scores, such as {"mAP50": 0.8}.
        comparison: Difference to the baseline of the same setting, paired by seed; None for a baseline, and for a
            variant without a finished seed in common with the baseline.
        failed: Number of runs without a score because of an error.
        stopped: Number of runs stopped early by halving.
        unfinished: Number of runs not yet started, or interrupted.
        sites, parameters, gflops_640: Those of its first finished run, or of its first run if none is finished.
        seconds_per_epoch: Mean over its finished runs; NaN if unknown.
        latency_ms: Median latency of one image in milliseconds; None if it was not measured.
        over_images: Whether the trained networks would differ on other images, by the bootstrap; None without
            detections of the same images by a finished run of both.
        over_seeds_and_images: Whether the variant and the baseline would differ with other seeds and other images; None
            unless both have several such runs.
        runs_with_detections: Number of its finished runs that these two are from.
        averaged: Scores of the mean weights of the last epochs; None if no run has them.
        validation_share: Validation images per training image if each seed divides them anew, which the intervals and
            tests over seeds heed; 0 otherwise.
        coco_scores: Means of COCO's scores over these runs, or over those with detections of their own images if each
            seed divides the images, by the names of `HEADLINES`; those of sizes that no object has are left out.
        precision, recall: Means over its finished runs, as in `RunRecord`; NaN if unknown.
    """

    variant: str
    activation: str
    setting: str
    is_baseline: bool
    summary: Summary
    other_scores: dict[str, float]
    comparison: Comparison | None
    failed: int
    stopped: int
    unfinished: int
    sites: int
    parameters: int
    gflops_640: float
    seconds_per_epoch: float
    latency_ms: float | None
    over_images: Conclusion | None
    over_seeds_and_images: Conclusion | None
    runs_with_detections: int
    averaged: AveragedScores | None
    validation_share: float
    coco_scores: dict[str, float]
    precision: float
    recall: float

    def _summarise(self) -> str:
        """Return the variant, its number of finished runs, their mean and the verdict."""
        mean = [f"{self.summary.mean:.3f}"] if self.summary.runs else []
        verdict = ["baseline"] if self.is_baseline else [self.comparison.verdict] if self.comparison else []
        return ", ".join([self.variant, format_count(self.summary.runs, "run"), *mean, *verdict])


def choose_metric(records: Sequence[RunRecord]) -> str:
    """Return the name of the score that variants are ranked by: "mAP50-95", or "top1" for classification.

    Args:
        records: Runs to compare.

    Raises:
        InputError: Some runs have mAP50-95 and others top1.
    """
    scored = {name for record in records for name in record.scores}
    if {"top1", "mAP50-95"} <= scored:
        raise InputError("some runs classify and others detect, which do not compare: report them separately")
    return "top1" if "top1" in scored and "mAP50-95" not in scored else "mAP50-95"


def build_leaderboard(
    records: Sequence[RunRecord],
    *,
    baseline: str,
    latencies: Mapping[str, float] = MappingProxyType({}),
    scores: Mapping[Path, RunScores] = MappingProxyType({}),
) -> list[LeaderboardRow]:
    """Return the leaderboard of some runs, with the best mean score first and variants without a score last.

    Each variant is compared with the baseline of the same setting over the seeds that both have finished. If a setting
    has no baseline or several, its variants are not compared. Of several finished runs of one variant and seed, only
    the first by name counts. The result does not depend on the order of the records.

    Args:
        records: Runs of one study, or of several folders.
        baseline: Activation of the baseline, such as "stock".
        latencies: Median latency of one image in milliseconds, by variant; variants may be missing.
        scores: Scores on resamples of the validation images, by run folder; runs may be missing.

    Raises:
        InputError: The runs have different kinds of scores.
    """
    metric = choose_metric(records)
    variants: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda each: (each.variant, each.name, str(each.folder))):
        variants.setdefault(record.variant, []).append(record)
    finished = {variant: index_by_seed(runs, metric) for variant, runs in variants.items()}
    baselines: dict[str, list[str]] = {}
    for variant, (first, *_) in variants.items():
        if first.activation == baseline:
            baselines.setdefault(first.setting, []).append(variant)

    compared_with: dict[str, str] = {}
    for variant, (first, *_) in variants.items():
        candidates = baselines.get(first.setting, [])
        if len(candidates) != 1 or variant in candidates:
            continue
        compared_with[variant] = candidates[0]
    shares = {variant: _find_share(runs.values()) for variant, runs in finished.items()}
    values = {variant: {seed: run.scores[metric] for seed, run in runs.items()} for variant, runs in finished.items()}
    rivals = {variant: (variant, reference) for variant, reference in compared_with.items()}
    compared = compare(pair_by_seed(values, rivals), shares)
    averaged = _summarise_averages(finished, metric, rivals, shares)
    kept = {
        variant: [scores[run.folder] for run in runs.values() if run.folder in scores and not shares[variant]]
        for variant, runs in finished.items()
    }
    truths = {variant: runs[0].truth for variant, runs in kept.items() if runs}
    # Of each variant, those validated on the images of its baseline.
    resampled = {
        variant: select_scores(runs, truths.get(compared_with.get(variant, variant), ""))
        for variant, runs in kept.items()
    }
    # Where each seed divides the images, each run has scores of its own validation images.
    coco = {
        variant: [scores[run.folder].scores for run in runs.values() if run.folder in scores]
        if shares[variant]
        else resampled[variant]
        for variant, runs in finished.items()
    }
    over_images, over_both = _compare_resampled(resampled, compared_with)
    rows = [
        _make_row(
            runs,
            finished[variant],
            metric,
            baseline,
            (compared.get(variant), over_images.get(variant), over_both.get(variant)),
            latencies.get(variant),
            len(resampled[variant]),
            averaged.get(variant),
            shares[variant],
            coco[variant],
        )
        for variant, runs in variants.items()
    ]
    return sorted(rows, key=lambda row: (not row.summary.runs, -row.summary.mean if row.summary.runs else 0.0))


def _find_share(runs: Iterable[RunRecord]) -> float:
    """Return how many validation images there are per training image, if seeds divide them anew; 0 otherwise."""
    return max((run.validation_share for run in runs if math.isfinite(run.validation_share)), default=0.0)


def pair_by_seed(
    values: Mapping[str, Mapping[int, float]], rivals: Mapping[K, tuple[str, str]]
) -> dict[K, tuple[list[float], list[float]]]:
    """Return the scores of two variants each, of the seeds that both have, if there are any.

    Args:
        values: Scores by variant and seed.
        rivals: The two variants of each comparison, by its key, which is also that of the result.
    """
    pairs = {}
    for key, (variant, other) in rivals.items():
        own, reference = values[variant], values[other]
        if seeds := [seed for seed in own if seed in reference]:
            pairs[key] = [own[seed] for seed in seeds], [reference[seed] for seed in seeds]
    return pairs


def _summarise_averages(
    finished: Mapping[str, Mapping[int, RunRecord]],
    metric: str,
    rivals: Mapping[str, tuple[str, str]],
    shares: Mapping[str, float],
) -> dict[str, AveragedScores]:
    """Return the scores of the mean weights of the last epochs, of the variants that have any.

    Args:
        finished: Finished runs by variant and seed.
        metric: Name of the ranked score.
        rivals: Each variant that has a baseline, and the baseline.
        shares: Validation images per training image of each variant.
    """
    values = {
        variant: {seed: run.averaged_scores[metric] for seed, run in runs.items() if metric in run.averaged_scores}
        for variant, runs in finished.items()
    }
    compared = compare(pair_by_seed(values, rivals), shares)
    return {
        variant: AveragedScores(
            max(run.averaged_epochs for run in finished[variant].values()),
            summarise_scores(list(found.values()), shares[variant]),
            compared.get(variant),
        )
        for variant, found in values.items()
        if found
    }


def _compare_resampled(
    runs: Mapping[str, Sequence[Scores]], compared_with: Mapping[str, str]
) -> tuple[dict[str, Conclusion], dict[str, Conclusion]]:
    """Return what may be concluded of each variant over images, and over seeds and images, each corrected by Holm.

    Args:
        runs: Scores of the runs of each variant on resamples of the images of its baseline.
        compared_with: The baseline of each variant that has one.
    """
    images: dict[str, Difference] = {}
    both: dict[str, Difference] = {}
    for variant, baseline in compared_with.items():
        reference, own = runs[baseline], runs[variant]
        if not reference or not own or has_learned_nothing(reference, own, row=0):
            continue
        images[variant] = compare_over_images(reference, own, row=0)
        if min(len(reference), len(own)) > 1:
            both[variant] = compare_over_seeds_and_images(reference, own, row=0)
    return conclude(images), conclude(both)


def index_by_seed(runs: Sequence[RunRecord], metric: str) -> dict[int, RunRecord]:
    """Return the finished run of each seed, by seed; of several, the first by name.

    Args:
        runs: Runs of one variant.
        metric: Name of the score that a finished run must have.
    """
    finished: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda each: (each.name, str(each.folder))):
        if run.state == "done" and metric in run.scores:
            finished.setdefault(run.seed, run)
    return finished


def _make_row(
    runs: Sequence[RunRecord],
    finished: Mapping[int, RunRecord],
    metric: str,
    baseline: str,
    comparisons: tuple[Comparison | None, Conclusion | None, Conclusion | None],
    latency: float | None,
    with_detections: int,
    averaged: AveragedScores | None,
    share: float,
    coco: Sequence[Scores],
) -> LeaderboardRow:
    """Return the row of a variant.

    Args:
        runs: All its runs.
        finished: Its finished runs by seed.
        metric: Name of the ranked score.
        baseline: Activation of the baseline.
        comparisons: Its comparison with the baseline: over seeds, over images, and over seeds and images.
        latency: Its latency in milliseconds.
        with_detections: Number of its finished runs with detections of the same images.
        averaged: Scores of the mean weights of its last epochs.
        share: Validation images per training image if seeds divide them anew; 0 otherwise.
        coco: COCO's scores of its finished runs.
    """
    done = list(finished.values())
    first = done[0] if done else runs[0]
    states = Counter(run.state for run in runs)
    return LeaderboardRow(
        variant=first.variant,
        activation=first.activation,
        setting=first.setting,
        is_baseline=first.activation == baseline,
        summary=summarise_scores([run.scores[metric] for run in done], share),
        other_scores={
            name: fmean(run.scores[name] for run in done if name in run.scores)
            for name in _list_other_scores(done, metric)
        },
        comparison=comparisons[0],
        over_images=comparisons[1],
        over_seeds_and_images=comparisons[2],
        runs_with_detections=with_detections,
        averaged=averaged,
        validation_share=share,
        coco_scores=_average_headlines(coco),
        precision=_average(run.precision for run in done),
        recall=_average(run.recall for run in done),
        failed=states["failed"],
        stopped=states["stopped"],
        unfinished=states["unfinished"],
        sites=first.sites,
        parameters=first.parameters,
        gflops_640=first.gflops_640,
        seconds_per_epoch=_average(run.seconds_per_epoch for run in done),
        latency_ms=latency,
    )


def _average_headlines(runs: Sequence[Scores]) -> dict[str, float]:
    """Return the means of COCO's scores over some runs by name, without those that no run has."""
    means = {name: _average(float(run.observed[row]) for run in runs) for row, name in enumerate(HEADLINES)}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def _average(values: Iterable[float]) -> float:
    """Return the mean of the values that are known, NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _list_other_scores(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Return the names of the other scores of some runs, sorted."""
    return sorted({name for run in runs for name in run.scores} - {metric})
