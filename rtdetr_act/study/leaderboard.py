"""The leaderboard: one row per variant, with its spread and its difference to the baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

import polars as pl
import polars.selectors as cs
from rich.markup import escape
from rich.table import Table

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
    HALF_POINT,
    LEVEL,
    Comparison,
    Conclusion,
    Difference,
    Summary,
    compare,
    conclude,
    summarise_scores,
)
from rtdetr_act.formatting import format_count, format_p, format_score, join_words
from rtdetr_act.results import Result
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.tables import format_markdown_table

_COLUMNS = (
    "variant", "runs", "score", "difference", "p (Holm)", "verdict", "seeds needed", "parameters", "GFLOPs (640)",
    "ms/image",
)  # fmt: skip

# Columns of the conclusions of the bootstrap, and what each question is called there.
_QUESTIONS = ("images", "seeds_images")
_CONCLUSION_COLUMNS = ("low", "high", "p", "p_holm", "verdict")
_DIFFERENCE_COLUMNS = ("difference", "difference_low", "difference_high", "p", "p_holm")


CONCLUSION_TITLES = (
    "variant",
    "trained networks, other images",
    "p (Holm)",
    "verdict",
    "other seeds, other images",
    "p (Holm)",
    "verdict",
)
CONCLUSION_NOTE = (
    "mAP50-95 as COCO defines it, minus that of the baseline: intervals and p-values from a paired bootstrap over the "
    "validation images, corrected by Holm. On the left, would these trained networks differ on other images of the "
    "same kind? On the right, would the variants differ, trained with other seeds and validated on other images?"
)


AVERAGE_TITLES = ("variant", "best epoch", "mean of the last", "difference to baseline", "p (Holm)", "verdict")
AVERAGE_NOTE = (
    "Scores of the mean weights of the last epochs, beside those of best.pt, which is the epoch with the highest score "
    "on these very images and so a maximum over noise. The differences are between mean weights, tested and corrected "
    "as above. Decide before a study which of the two it is judged by."
)
SPLITS_NOTE = (
    "Each seed divides the images for training and validation anew. Runs share images, so that standard errors are "
    "those of Nadeau and Bengio (2003), and there is no set of images that all runs could be resampled on."
)


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
    compared = compare(_pair_by_seed(values, compared_with), shares)
    averaged = _summarise_averages(finished, metric, compared_with, shares)
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


def _pair_by_seed(
    values: Mapping[str, Mapping[int, float]], compared_with: Mapping[str, str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the scores of each variant and of its baseline, of the seeds that both have, if there are any.

    Args:
        values: Scores by variant and seed.
        compared_with: The baseline of each variant that has one.
    """
    pairs = {}
    for variant, baseline in compared_with.items():
        own, other = values.get(variant, {}), values.get(baseline, {})
        if seeds := [seed for seed in own if seed in other]:
            pairs[variant] = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
    return pairs


def _summarise_averages(
    finished: Mapping[str, Mapping[int, RunRecord]],
    metric: str,
    compared_with: Mapping[str, str],
    shares: Mapping[str, float],
) -> dict[str, AveragedScores]:
    """Return the scores of the mean weights of the last epochs, of the variants that have any.

    Args:
        finished: Finished runs by variant and seed.
        metric: Name of the ranked score.
        compared_with: The baseline of each variant that has one.
        shares: Validation images per training image of each variant.
    """
    values = {
        variant: {seed: run.averaged_scores[metric] for seed, run in runs.items() if metric in run.averaged_scores}
        for variant, runs in finished.items()
    }
    compared = compare(_pair_by_seed(values, compared_with), shares)
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


def encode_leaderboard(rows: Sequence[LeaderboardRow], metric: str) -> dict[str, bytes]:
    """Return the contents of leaderboard.csv, leaderboard.parquet and leaderboard.md, by file name.

    Equal rows give equal bytes. Unknown values are empty cells, and null in Parquet. Numbers have six significant
    digits in CSV, and full precision in Parquet.

    Args:
        rows: As `build_leaderboard` returns them.
        metric: As `choose_metric` returns it, which is also the name of the column of means.
    """
    frame = make_leaderboard_frame(rows, metric)
    parquet = BytesIO()
    frame.write_parquet(parquet)
    rounded = frame.with_columns(cs.float().round_sig_figs(6))
    return {
        "leaderboard.csv": rounded.write_csv().encode(),
        "leaderboard.parquet": parquet.getvalue(),
        "leaderboard.md": _format_markdown(rows, metric).encode(),
    }


def make_leaderboard_frame(rows: Sequence[LeaderboardRow], metric: str) -> pl.DataFrame:
    """Return the leaderboard as a data frame, with null for unknown values.

    Args:
        rows: As `build_leaderboard` returns them.
        metric: Name of the column of means.
    """
    others = list(dict.fromkeys(name for row in rows for name in row.other_scores))
    schema = {
        **dict.fromkeys(("variant", "activation", "setting"), pl.String),
        "baseline": pl.Boolean,
        **dict.fromkeys(("runs", "failed", "stopped", "unfinished"), pl.Int64),
        **dict.fromkeys((metric, "sd", "ci_low", "ci_high", *others), pl.Float64),
        "pairs": pl.Int64,
        **dict.fromkeys((*_DIFFERENCE_COLUMNS, "effect"), pl.Float64),
        "seeds_needed": pl.Int64,
        "verdict": pl.String,
        **{
            f"{name}_{column}": pl.String if column == "verdict" else pl.Float64
            for name in _QUESTIONS
            for column in _CONCLUSION_COLUMNS
        },
        "averaged_epochs": pl.Int64,
        **dict.fromkeys(("averaged", "averaged_sd", "averaged_ci_low", "averaged_ci_high"), pl.Float64),
        **dict.fromkeys((f"averaged_{name}" for name in _DIFFERENCE_COLUMNS), pl.Float64),
        "averaged_verdict": pl.String,
        **dict.fromkeys(("sites", "parameters"), pl.Int64),
        **dict.fromkeys(("gflops_640", "seconds_per_epoch", "latency_ms"), pl.Float64),
    }
    frame = pl.DataFrame([_make_frame_row(row, metric) for row in rows], schema=schema)
    return frame.with_columns(cs.float().fill_nan(None))


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


def _make_frame_row(row: LeaderboardRow, metric: str) -> dict[str, object]:
    """Return the values of a row by column of the data frame."""
    summary, comparison = row.summary, row.comparison
    cells: dict[str, object] = {
        "variant": row.variant,
        "activation": row.activation,
        "setting": row.setting,
        "baseline": row.is_baseline,
        "runs": summary.runs,
        "failed": row.failed,
        "stopped": row.stopped,
        "unfinished": row.unfinished,
        metric: summary.mean,
        "sd": summary.deviation,
        "ci_low": summary.low,
        "ci_high": summary.high,
        **row.other_scores,
        "sites": row.sites,
        "parameters": row.parameters or None,
        "gflops_640": row.gflops_640 or None,
        "seconds_per_epoch": row.seconds_per_epoch,
        "latency_ms": row.latency_ms,
    }
    if comparison:
        cells |= {"pairs": comparison.pairs, **_list_difference(comparison), "effect": comparison.effect}
        cells |= {"seeds_needed": comparison.seeds_needed, "verdict": comparison.verdict}
    if row.averaged:
        own, other = row.averaged.summary, row.averaged.comparison
        cells |= {"averaged_epochs": row.averaged.epochs, "averaged": own.mean, "averaged_sd": own.deviation}
        cells |= {"averaged_ci_low": own.low, "averaged_ci_high": own.high}
        if other:
            cells |= {f"averaged_{name}": value for name, value in _list_difference(other).items()}
            cells["averaged_verdict"] = other.verdict
    for name, conclusion in zip(_QUESTIONS, (row.over_images, row.over_seeds_and_images), strict=True):
        if conclusion:
            cells |= {f"{name}_{column}": getattr(conclusion, column) for column in _CONCLUSION_COLUMNS}
    return cells


def _list_difference(comparison: Comparison) -> dict[str, float]:
    """Return the values of `_DIFFERENCE_COLUMNS`."""
    values = (comparison.difference, comparison.low, comparison.high, comparison.p, comparison.p_holm)
    return dict(zip(_DIFFERENCE_COLUMNS, values, strict=True))


def make_leaderboard_table(rows: Sequence[LeaderboardRow], metric: str) -> Table:
    """Return the leaderboard as a table for a terminal of 80 columns or more.

    Args:
        rows: As `build_leaderboard` returns them.
        metric: Title of the column of means.
    """
    caption = "± standard deviation; difference with its interval, corrected by Holm as p is"
    table = Table(title="Leaderboard", caption=caption)
    for title in ("variant", "runs", metric, "difference", "p", "verdict"):
        table.add_column(title, overflow="fold", justify="left" if title in ("variant", "verdict") else "right")
    for row in rows:
        variant, runs, score, difference, p, verdict, *_ = _format_row(row)
        table.add_row(escape(variant), runs, score.partition(" [")[0], escape(difference), p, verdict)
    return table


def make_conclusion_table(rows: Sequence[LeaderboardRow]) -> Table:
    """Return what the bootstrap says of each variant as a table for a terminal of 80 columns or more."""
    table = Table(title="Over seeds and images", caption="bootstrap over images; intervals and p corrected by Holm")
    for title in ("variant", "on other images", "p", "and with other seeds", "p", "verdict"):
        table.add_column(title, overflow="fold", justify="left" if title in ("variant", "verdict") else "right")
    for variant, images, p, _, both, p_both, verdict in list_conclusions(rows):
        table.add_row(escape(variant), images, p, both, p_both, verdict)
    return table


def make_average_table(rows: Sequence[LeaderboardRow]) -> Table:
    """Return the scores of the mean weights of the last epochs as a table for a terminal of 80 columns or more."""
    table = Table(title="Mean weights of the last epochs", caption="± standard deviation; intervals and p as above")
    for title in AVERAGE_TITLES:
        table.add_column(title, overflow="fold", justify="left" if title in ("variant", "verdict") else "right")
    for cells in list_averages(rows):
        table.add_row(*map(escape, cells))
    return table


def list_averages(rows: Sequence[LeaderboardRow]) -> list[tuple[str, ...]]:
    """Return the cells of a table of the mean weights of the last epochs, those of `AVERAGE_TITLES`."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        if not row.averaged:
            continue
        own = row.averaged
        mean = f"{_format_mean(own.summary)} ({format_count(own.epochs, 'epoch')})"
        difference, p, verdict = _format_comparison(own.comparison, is_baseline=row.is_baseline)
        found.append((row.variant, _format_mean(row.summary), mean, difference, p, verdict))
    return found


def describe_missing_averages(rows: Sequence[LeaderboardRow]) -> str:
    """Return a sentence on finished runs whose last epochs were not averaged; "" if there are none, or no others."""
    counts = {row.variant: row.summary.runs - (row.averaged.summary.runs if row.averaged else 0) for row in rows}
    named = [f"{format_count(count, 'run')} of {variant}" for variant, count in counts.items() if count]
    return f"Without mean weights: {join_words(named)}." if named and any(row.averaged for row in rows) else ""


def _format_mean(summary: Summary) -> str:
    """Return the mean with the standard deviation, if there is one."""
    spread = f" ± {summary.deviation:.3f}" if summary.runs > 1 else ""
    return f"{summary.mean:.3f}{spread}" if summary.runs else ""


def _format_comparison(comparison: Comparison | None, *, is_baseline: bool) -> tuple[str, str, str]:
    """Return the difference with its interval, the p-value and the verdict."""
    if comparison is None:
        return "", "", "baseline" if is_baseline else "not compared"
    known = not math.isnan(comparison.low)
    interval = f" [{comparison.low:+.3f}, {comparison.high:+.3f}]" if known else ""
    p = "" if math.isnan(comparison.p_holm) else format_p(comparison.p_holm)
    return f"{comparison.difference:+.3f}{interval}", p, comparison.verdict


def _format_markdown(rows: Sequence[LeaderboardRow], metric: str) -> str:
    """Return the leaderboard and notes on it in Markdown."""
    header = (*_COLUMNS[:2], metric, *_COLUMNS[3:])
    alignment = ("---", *["---:"] * 4, "---", *["---:"] * 4)
    table = format_markdown_table(header, [_format_row(row) for row in rows], alignment)
    parts = ["# Leaderboard", table, *_write_notes(rows, metric)]
    if cells := list_conclusions(rows):
        parts += [
            "## Over images, and over seeds and images",
            format_markdown_table(CONCLUSION_TITLES, cells),
            CONCLUSION_NOTE,
        ]
    if averages := list_averages(rows):
        parts += ["## Mean weights of the last epochs", format_markdown_table(AVERAGE_TITLES, averages), AVERAGE_NOTE]
    parts += filter(None, [describe_missing_detections(rows), describe_missing_averages(rows)])
    return "\n\n".join(parts) + "\n"


def list_conclusions(rows: Sequence[LeaderboardRow]) -> list[tuple[str, ...]]:
    """Return the cells of a table of what the bootstrap says of each variant, those of `CONCLUSION_TITLES`."""
    return [
        (row.variant, *_format_conclusion(row.over_images), *_format_conclusion(row.over_seeds_and_images))
        for row in rows
        if row.over_images
    ]


def describe_missing_detections(rows: Sequence[LeaderboardRow]) -> str:
    """Return a sentence on finished runs that have no part in the bootstrap; "" if it has all of them, or none."""
    if not any(row.runs_with_detections for row in rows) or any(row.validation_share for row in rows):
        return ""
    missing = {row.variant: row.summary.runs - row.runs_with_detections for row in rows}
    named = [f"{format_count(count, 'run')} of {variant}" for variant, count in missing.items() if count]
    if not named:
        return ""
    return f"Without part in the bootstrap, since they kept no detections of these images: {join_words(named)}."


def _format_conclusion(conclusion: Conclusion | None) -> tuple[str, str, str]:
    """Return the interval, the p-value and the verdict."""
    if conclusion is None:
        return "", "", ""
    interval = f"{format_score(conclusion.low, '+')} to {format_score(conclusion.high, '+')}"
    return interval, format_p(conclusion.p_holm), conclusion.verdict


def _format_row(row: LeaderboardRow) -> tuple[str, ...]:
    """Return the cells of a row, those of `_COLUMNS`."""
    summary, comparison = row.summary, row.comparison
    total = summary.runs + row.failed + row.stopped + row.unfinished
    interval = f" [{summary.low:.3f}, {summary.high:.3f}]" if summary.runs > 1 else ""
    score = _format_mean(summary) + interval
    difference, p, verdict = _format_comparison(comparison, is_baseline=row.is_baseline)
    seeds = str(comparison.seeds_needed) if comparison and comparison.seeds_needed is not None else ""
    return (
        row.variant,
        str(summary.runs) if summary.runs == total else f"{summary.runs} of {total}",
        score,
        difference,
        p,
        verdict,
        seeds,
        f"{row.parameters:,}" if row.parameters else "",
        f"{row.gflops_640:.2f}" if row.gflops_640 else "",
        "" if row.latency_ms is None else f"{row.latency_ms:.2f}",
    )


def _write_notes(rows: Sequence[LeaderboardRow], metric: str) -> list[str]:
    """Return paragraphs on how to read the leaderboard."""
    compared = [row.comparison for row in rows if row.comparison]
    tested = sum(not math.isnan(comparison.p_holm) for comparison in compared)
    notes = [
        f"{metric} is a fraction of 1: the mean over the finished runs (one per seed) ± the standard deviation, and in "
        "brackets the 95 % confidence interval of the mean by Student's t."
    ]
    if compared:
        notes += [
            "Differences are to the baseline with the same settings, over the seeds that both finished, paired by "
            "seed. The p-values are those of the paired t-test, corrected by Holm for "
            f'{format_count(tested, "comparison")}; below {LEVEL} the verdict is "better" or "worse". The '
            "intervals in brackets are corrected in the same way, so that they leave out zero just then; a single one "
            "is a 95 % interval.",
            '"No difference shown" does not mean equal: these runs cannot tell the two apart. There is no p-value '
            "with a single pair of runs, nor where all pairs differ by the very same amount.",
            f'"Seeds needed" is how many would show a true difference of half a point ({HALF_POINT}) in four cases '
            "of five, in a single comparison at the spread seen here; with few seeds it is a rough figure.",
        ]
    else:
        notes.append("Nothing is compared: no variant shares settings and a finished seed with a baseline.")
    if any(row.validation_share for row in rows):
        notes.append(SPLITS_NOTE)
    if any(row.gflops_640 for row in rows):
        notes.append(
            "GFLOPs (640) are the floating-point operations for one image of 640 x 640 pixels, activations included, "
            "in 1e9, whatever the size of the training."
        )
    notes += filter(None, [describe_lost_runs(rows)])
    return notes


def describe_lost_runs(rows: Sequence[LeaderboardRow]) -> str:
    """Return a sentence on runs that have no score; "" if there are none."""
    lost = {
        "failed": sum(row.failed for row in rows),
        "were stopped early": sum(row.stopped for row in rows),
        "are unfinished": sum(row.unfinished for row in rows),
    }
    if not any(lost.values()):
        return ""
    counts = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
    return f"Of the runs, {counts}; they have no part in the means and differences."
