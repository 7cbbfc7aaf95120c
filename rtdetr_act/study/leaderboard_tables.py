"""The leaderboard as files, as tables of a terminal, and what is said about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

import polars as pl
import polars.selectors as cs
from rich.markup import escape
from rich.table import Table

from rtdetr_act.evaluation.statistics import (
    HALF_POINT,
    LEVEL,
    Comparison,
    Conclusion,
    Summary,
)
from rtdetr_act.formatting import format_count, format_p, format_score, join_words
from rtdetr_act.study.leaderboard import LeaderboardRow
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
AVERAGE_NOTE = (
    "Scores of the mean weights of the last epochs, beside those of best.pt, which is the epoch with the highest score "
    "on these very images and so a maximum over noise. The differences are between mean weights, tested and corrected "
    "as above. Decide before a study which of the two it is judged by."
)
SPLITS_NOTE = (
    "Each seed divides the images for training and validation anew. Runs share images, so that standard errors are "
    "those of Nadeau and Bengio (2003), and there is no set of images that all runs could be resampled on."
)


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
    for title in list_average_titles(rows):
        table.add_column(title, overflow="fold", justify="left" if title in ("variant", "verdict") else "right")
    for cells in list_averages(rows):
        table.add_row(*map(escape, cells))
    return table


def list_average_titles(rows: Sequence[LeaderboardRow]) -> tuple[str, ...]:
    """Return the titles of a table of the mean weights of the last epochs."""
    numbers = sorted({row.averaged.epochs for row in rows if row.averaged})
    last = f"last {' or '.join(map(str, numbers))} epochs"
    return ("variant", "best epoch", last, "difference", "p (Holm)", "verdict")


def list_averages(rows: Sequence[LeaderboardRow]) -> list[tuple[str, ...]]:
    """Return the cells of a table of the mean weights of the last epochs, those of `list_average_titles`."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        if not row.averaged:
            continue
        own = row.averaged
        difference, p, verdict = _format_comparison(own.comparison, is_baseline=row.is_baseline)
        found.append((row.variant, _format_mean(row.summary), _format_mean(own.summary), difference, p, verdict))
    return found


def describe_missing_averages(rows: Sequence[LeaderboardRow]) -> str:
    """Return a sentence on finished runs whose last epochs were not averaged; "" if there are none, or no others."""
    named = _name_runs(
        {row.variant: row.summary.runs - (row.averaged.summary.runs if row.averaged else 0) for row in rows}
    )
    return f"Without mean weights: {named}." if named and any(row.averaged for row in rows) else ""


def _name_runs(counts: Mapping[str, int]) -> str:
    """Return numbers of runs by variant as words, "2 runs of arelu and 1 run of mish"; "" if all are 0."""
    return join_words([f"{format_count(count, 'run')} of {variant}" for variant, count in counts.items() if count])


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
        parts += [
            "## Mean weights of the last epochs",
            format_markdown_table(list_average_titles(rows), averages),
            AVERAGE_NOTE,
        ]
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
    named = _name_runs({row.variant: row.summary.runs - row.runs_with_detections for row in rows})
    return f"Without part in the bootstrap, since they kept no detections of these images: {named}." if named else ""


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
