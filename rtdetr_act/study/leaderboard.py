"""The leaderboard: one line per variant, with its spread and its difference to the baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from types import MappingProxyType

import polars as pl
import polars.selectors as cs
from rich.markup import escape
from rich.table import Table

from rtdetr_act.errors import InputError
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.statistics import HALF_POINT, LEVEL, Comparison, Summary, compare, summarise

_COLUMNS = ("variant", "runs", "score", "difference", "p (Holm)", "verdict", "seeds needed", "parameters", "ms/image")
_BAR = r"\|"  # a vertical bar in a cell of a Markdown table


@dataclass(frozen=True)
class LeaderboardRow:
    """One variant in the leaderboard.

    Attributes:
        variant: Its name, such as "arelu lr0=0.01".
        activation: The plan, or "stock".
        setting: See `Record.setting`.
        is_baseline: Whether others of the same setting are compared with it.
        summary: Mean, standard deviation and interval of the headline score over its finished runs.
        others: Means of the other scores, such as {"mAP50": 0.8}.
        comparison: Difference to the baseline of the same setting, paired by seed; None for a baseline itself and
            where it has no finished run of a seed that the baseline has finished too.
        failed: Runs without a score, because of an error.
        stopped: Runs that halving ended early.
        unfinished: Runs not yet made, or cut short.
        sites, parameters, gflops: Of its first finished run, or of its first run where none finished.
        seconds_per_epoch: Mean over its finished runs; NaN where unknown.
        latency: Median time of one image in ms, or None where it was not measured.
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
    gflops: float
    seconds_per_epoch: float
    latency_ms: float | None


def choose_metric(records: Sequence[RunRecord]) -> str:
    """Return the score that variants are ranked by: mAP50-95, or top1 where runs have that instead.

    Raises:
        InputError: Some runs have one and others the other, so that one kind would be left out.
    """
    scored = {name for record in records for name in record.scores}
    if {"top1", "mAP50-95"} <= scored:
        raise InputError("some of the runs classify and others detect, so that they do not compare: report them apart")
    return "top1" if "top1" in scored and "mAP50-95" not in scored else "mAP50-95"


def build_leaderboard(
    records: Sequence[RunRecord], *, baseline: str, latencies: Mapping[str, float] = MappingProxyType({})
) -> list[LeaderboardRow]:
    """Summarise each variant, and compare it with the baseline of the same setting over the seeds that both finished.

    Where a setting has no baseline, or several variants that could be it, nothing is compared. Of finished runs of one
    variant and one seed, as made by hand, the first by name counts and the others are left out. The order of the
    records does not matter.

    Args:
        records: Runs of one study, or of folders put together.
        baseline: Activation that the others are compared with, such as "stock".
        latencies: Median time of one image in ms, by variant, of those that were measured.

    Returns:
        Lines, the best mean first, those without a finished run last.
    """
    metric = choose_metric(records)
    variants: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda each: (each.variant, each.name, str(each.folder))):
        variants.setdefault(record.variant, []).append(record)
    finished = {variant: _index_by_seed(runs, metric) for variant, runs in variants.items()}
    baselines: dict[str, list[str]] = {}
    for variant, (first, *_) in variants.items():
        if first.activation == baseline:
            baselines.setdefault(first.setting, []).append(variant)

    pairs = {}
    for variant, (first, *_) in variants.items():
        candidates = baselines.get(first.setting, [])
        if len(candidates) != 1 or variant in candidates:
            continue
        own, other = finished[variant], finished[candidates[0]]
        if seeds := [seed for seed in own if seed in other]:
            pairs[variant] = ([own[s].scores[metric] for s in seeds], [other[s].scores[metric] for s in seeds])
    compared = compare(pairs)
    lines = [
        _make_row(runs, finished[variant], metric, baseline, compared.get(variant), latencies.get(variant))
        for variant, runs in variants.items()
    ]
    return sorted(lines, key=lambda line: (not line.summary.runs, -line.summary.mean if line.summary.runs else 0.0))


def encode_leaderboard(lines: Sequence[LeaderboardRow], metric: str) -> dict[str, bytes]:
    """Return what leaderboard.csv, leaderboard.parquet and leaderboard.md hold, by their names.

    The same lines give the same bytes. What is unknown is an empty cell, and null in Parquet; the CSV has six
    significant digits, the Parquet file all.

    Args:
        lines: As `build_leaderboard` returns them.
        metric: As `choose_metric` returns it; the column of the means has its name.
    """
    frame = make_leaderboard_frame(lines, metric)
    parquet = BytesIO()
    frame.write_parquet(parquet)
    rounded = frame.with_columns(cs.float().round_sig_figs(6))
    return {
        "leaderboard.csv": rounded.write_csv().encode(),
        "leaderboard.parquet": parquet.getvalue(),
        "leaderboard.md": _format_markdown(lines, metric).encode(),
    }


def make_leaderboard_frame(lines: Sequence[LeaderboardRow], metric: str) -> pl.DataFrame:
    """Return the leaderboard as a frame, one row per line, null where a value is unknown."""
    others = list(dict.fromkeys(name for line in lines for name in line.other_scores))
    schema = {
        **dict.fromkeys(("variant", "activation", "setting"), pl.String),
        "baseline": pl.Boolean,
        **dict.fromkeys(("runs", "failed", "stopped", "unfinished"), pl.Int64),
        **dict.fromkeys((metric, "sd", "ci_low", "ci_high", *others), pl.Float64),
        "pairs": pl.Int64,
        **dict.fromkeys(("difference", "difference_low", "difference_high", "p", "p_holm", "effect"), pl.Float64),
        "seeds_needed": pl.Int64,
        "verdict": pl.String,
        **dict.fromkeys(("sites", "parameters"), pl.Int64),
        **dict.fromkeys(("gflops", "seconds_per_epoch", "latency_ms"), pl.Float64),
    }
    frame = pl.DataFrame([_make_frame_row(line, metric) for line in lines], schema=schema)
    return frame.with_columns(cs.float().fill_nan(None))


def _index_by_seed(runs: Sequence[RunRecord], metric: str) -> dict[int, RunRecord]:
    finished: dict[int, RunRecord] = {}
    for run in runs:
        if run.state == "done" and metric in run.scores:
            finished.setdefault(run.seed, run)
    return finished


def _make_row(
    runs: Sequence[RunRecord],
    finished: Mapping[int, RunRecord],
    metric: str,
    baseline: str,
    comparison: Comparison | None,
    latency: float | None,
) -> LeaderboardRow:
    done = list(finished.values())
    first = done[0] if done else runs[0]
    states = Counter(run.state for run in runs)
    times = [run.seconds_per_epoch for run in done if not math.isnan(run.seconds_per_epoch)]
    return LeaderboardRow(
        variant=first.variant,
        activation=first.activation,
        setting=first.setting,
        is_baseline=first.activation == baseline,
        summary=summarise([run.scores[metric] for run in done]),
        other_scores={
            name: fmean(run.scores[name] for run in done if name in run.scores)
            for name in _list_other_scores(done, metric)
        },
        comparison=comparison,
        failed=states["failed"],
        stopped=states["stopped"],
        unfinished=states["unfinished"],
        sites=first.sites,
        parameters=first.parameters,
        gflops=first.gflops,
        seconds_per_epoch=fmean(times) if times else float("nan"),
        latency_ms=latency,
    )


def _list_other_scores(runs: Sequence[RunRecord], metric: str) -> list[str]:
    return sorted({name for run in runs for name in run.scores} - {metric})


def _make_frame_row(line: LeaderboardRow, metric: str) -> dict[str, object]:
    summary, comparison = line.summary, line.comparison
    cells: dict[str, object] = {
        "variant": line.variant,
        "activation": line.activation,
        "setting": line.setting,
        "baseline": line.is_baseline,
        "runs": summary.runs,
        "failed": line.failed,
        "stopped": line.stopped,
        "unfinished": line.unfinished,
        metric: summary.mean,
        "sd": summary.deviation,
        "ci_low": summary.low,
        "ci_high": summary.high,
        **line.other_scores,
        "sites": line.sites,
        "parameters": line.parameters or None,
        "gflops": line.gflops or None,
        "seconds_per_epoch": line.seconds_per_epoch,
        "latency_ms": line.latency_ms,
    }
    if comparison:
        cells |= {
            "pairs": comparison.pairs,
            "difference": comparison.difference,
            "difference_low": comparison.low,
            "difference_high": comparison.high,
            "p": comparison.p,
            "p_holm": comparison.p_holm,
            "effect": comparison.effect,
            "seeds_needed": comparison.seeds_needed,
            "verdict": comparison.verdict,
        }
    return cells


def make_leaderboard_table(lines: Sequence[LeaderboardRow], metric: str) -> Table:
    """Return the leaderboard as a table for the terminal, 80 columns wide or more."""
    table = Table(title="Leaderboard", caption="± standard deviation; difference with its 95 % confidence interval")
    for title in ("variant", "runs", metric, "difference", "verdict"):
        table.add_column(title, overflow="fold", justify="left" if title in ("variant", "verdict") else "right")
    for line in lines:
        variant, runs, score, difference, _, verdict, *_ = _format_row(line)
        table.add_row(escape(variant), runs, score.partition(" [")[0], escape(difference), verdict)
    return table


def _format_markdown(lines: Sequence[LeaderboardRow], metric: str) -> str:
    header = (*_COLUMNS[:2], metric, *_COLUMNS[3:])
    rows = [header, ("---", *["---:"] * 4, "---", *["---:"] * 3), *(_format_row(line) for line in lines)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in row)} |" for row in rows)
    return "\n\n".join(["# Leaderboard", table, *_write_notes(lines, metric)]) + "\n"


def _format_row(line: LeaderboardRow) -> tuple[str, ...]:
    summary, comparison = line.summary, line.comparison
    total = summary.runs + line.failed + line.stopped + line.unfinished
    score, difference, p, verdict, seeds = "", "", "", "baseline" if line.is_baseline else "not compared", ""
    if summary.runs:
        spread = f" ± {summary.deviation:.3f} [{summary.low:.3f}, {summary.high:.3f}]" if summary.runs > 1 else ""
        score = f"{summary.mean:.3f}{spread}"
    if comparison:
        known = not math.isnan(comparison.low)
        interval = f" [{comparison.low:+.3f}, {comparison.high:+.3f}]" if known else ""
        difference, verdict = f"{comparison.difference:+.3f}{interval}", comparison.verdict
        p = "" if math.isnan(comparison.p_holm) else _format_p(comparison.p_holm)
        seeds = "" if comparison.seeds_needed is None else str(comparison.seeds_needed)
    return (
        line.variant,
        str(summary.runs) if summary.runs == total else f"{summary.runs} of {total}",
        score,
        difference,
        p,
        verdict,
        seeds,
        f"{line.parameters:,}" if line.parameters else "",
        "" if line.latency_ms is None else f"{line.latency_ms:.2f}",
    )


def _format_p(p: float) -> str:
    """Return a p-value as people write it.

    >>> _format_p(0.04321), _format_p(2e-7)
    ('0.043', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _write_notes(lines: Sequence[LeaderboardRow], metric: str) -> list[str]:
    compared = [line.comparison for line in lines if line.comparison]
    tested = sum(not math.isnan(comparison.p_holm) for comparison in compared)
    notes = [
        f"{metric} is a fraction of 1: the mean over the finished runs (one per seed) ± the standard deviation, and in "
        "brackets the 95 % confidence interval of the mean by Student's t."
    ]
    if compared:
        notes += [
            "Differences are to the baseline with the same settings, over the seeds that both finished, paired by "
            "seed, with their 95 % confidence interval (not corrected). The p-values are those of the paired t-test, "
            f"corrected by Holm for {tested} comparison{'' if tested == 1 else 's'}; below {LEVEL} the verdict is "
            '"better" or "worse".',
            '"No difference shown" does not mean equal: these runs cannot tell the two apart. There is no p-value '
            "with a single pair of runs, nor where all pairs differ by the very same amount.",
            f'"Seeds needed" is how many would show a true difference of half a point ({HALF_POINT}) in four cases '
            "of five, in a single comparison at the spread seen here; with few seeds it is a rough figure.",
        ]
    else:
        notes.append("Nothing is compared: no variant shares settings and a finished seed with a baseline.")
    lost = {
        "failed": sum(line.failed for line in lines),
        "were stopped early": sum(line.stopped for line in lines),
        "are unfinished": sum(line.unfinished for line in lines),
    }
    if any(lost.values()):
        counts = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        notes.append(f"Of the runs, {counts}; they have no part in the means and differences.")
    return notes
