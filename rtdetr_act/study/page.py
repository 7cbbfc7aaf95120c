"""HTML report of a study: a self-contained file for screens, phones and print."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rtdetr_act.evaluation.statistics import MANY_RUNS, NO_DIFFERENCE, NOTHING_LEARNED
from rtdetr_act.formatting import (
    MAX_LISTED,
    UNKNOWN,
    finite_or_none,
    format_count,
    format_number,
    format_p,
    format_score,
    join_words,
)
from rtdetr_act.study.chart_data import MAX_DRAWN, select_drawn
from rtdetr_act.study.charts import (
    assign_styles,
    draw_activations,
    draw_classes,
    draw_cost,
    draw_differences,
    draw_training,
)
from rtdetr_act.study.leaderboard import LeaderboardRow, index_by_seed
from rtdetr_act.study.leaderboard_tables import (
    AVERAGE_NOTE,
    CONCLUSION_NOTE,
    CONCLUSION_TITLES,
    SPLITS_NOTE,
    describe_missing_averages,
    describe_missing_detections,
    list_average_titles,
    list_averages,
    list_conclusions,
)
from rtdetr_act.study.pareto import LATENCY, PARAMETERS
from rtdetr_act.study.run_record import STATES, RunRecord, list_values

_TEMPLATE_FOLDER = Path(__file__).parent
# Arguments for the location of a run or its seed, in which variants do not differ.
_RUN_SPECIFIC = ("name", "project", "save_dir", "exist_ok", "resume", "seed")

# c1 to c6 are the Okabe-Ito palette without yellow, as in `rtdetr_act.analysis.figures`; c0 is the baseline. The dark
# scheme has lighter colours of the same hues. d0 to d7 are viridis, without the end that is invisible on the paper.
_PALETTES: dict[str, dict[str, str]] = {
    "light": {
        **{"paper": "#ffffff", "panel": "#f5f6f7", "ink": "#1a1d21", "quiet": "#5b636d", "rule": "#dfe2e6"},
        **{"link": "#0a5a94", "good": "#00694d", "bad": "#a84300", "c0": "#000000", "c1": "#0072B2", "c2": "#D55E00"},
        **{"c3": "#009E73", "c4": "#CC79A7", "c5": "#E69F00", "c6": "#56B4E9"},
        **{"d0": "#440154", "d1": "#482878", "d2": "#3e4a89", "d3": "#31688e"},
        **{"d4": "#26828e", "d5": "#1f9e89", "d6": "#35b779", "d7": "#7cc242"},
    },
    "dark": {
        **{"paper": "#14171a", "panel": "#1d2125", "ink": "#e6e8ea", "quiet": "#a0a8b0", "rule": "#343a40"},
        **{"link": "#7cc0f2", "good": "#4fd1a5", "bad": "#ff9a5c", "c0": "#ffffff", "c1": "#3d9be6", "c2": "#f5803c"},
        **{"c3": "#2bc49a", "c4": "#e39bc6", "c5": "#f2b632", "c6": "#9bd8ff"},
        **{"d0": "#5a6fb5", "d1": "#4a86c0", "d2": "#3f9bb8", "d3": "#3fb0a6"},
        **{"d4": "#55c28c", "d5": "#86d05f", "d6": "#bfdb3f", "d7": "#fde725"},
    },
}


@dataclass(frozen=True)
class _Bar:
    """Scores of a variant on an axis, as positions in percent.

    Attributes:
        mean: Their mean.
        interval: Start and width of its interval; None if there are few runs.
        runs: Single runs, if they are few.
    """

    mean: float
    interval: tuple[float, float] | None
    runs: tuple[float, ...]


@dataclass(frozen=True)
class _Cell:
    """Cell of a table.

    Attributes:
        text: Its text.
        key: Key to sort by; cells without a key come last.
        note: Small text below.
        bar: Bar between text and note.
        kind: CSS class of emphasised text.
    """

    text: str
    key: float | str | None
    note: str = ""
    bar: _Bar | None = None
    kind: str = ""


def render_page(
    rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], *, title: str, metric: str, latency_note: str = ""
) -> str:
    """Return the report of a study as HTML.

    All strings from files are escaped.

    Args:
        rows: The leaderboard, in the order to show.
        records: The runs. The charts show the 12 best variants and their baselines, with results.csv and
            activations.json read from their run folders.
        title: Heading of the page.
        metric: Name of the ranked score, "mAP50-95" or "top1".
        latency_note: Sentence on how latency was measured.

    Raises:
        InputError: The curves of learned activations of a run are damaged.
    """
    drawn = select_drawn(rows)
    styles = assign_styles(drawn)
    runs: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        runs[record.variant].append(record)
    difference = draw_differences(drawn, runs, styles, metric)
    costs = [draw_cost(drawn, runs, styles, metric, cost) for cost in (LATENCY, PARAMETERS)]
    curves = draw_training(drawn, runs, styles, metric)
    classes = draw_classes(drawn, runs, styles)
    shapes = draw_activations(drawn, runs)
    figures = {"difference": [difference], "costs": costs, "curves": curves, "classes": [classes], "shapes": shapes}
    numbered = {
        f"{section}-{index}": figure
        for section, members in figures.items()
        for index, figure in enumerate(members)
        if figure.traces
    }
    charts = {key: {"data": figure.traces, "layout": figure.layout} for key, figure in numbered.items()}
    environment = Environment(loader=FileSystemLoader(_TEMPLATE_FOLDER), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=_summarise_study(rows, records, metric),
        metric=metric,
        latency_note=latency_note,
        columns=_list_columns(rows, metric),
        rows=_make_cells(rows, runs, metric),
        few_runs=any(1 < row.summary.runs < MANY_RUNS for row in rows),
        many_runs=MANY_RUNS,
        conclusion_titles=CONCLUSION_TITLES,
        conclusions=list_conclusions(rows),
        conclusion_note=CONCLUSION_NOTE,
        missing_detections=describe_missing_detections(rows),
        average_titles=list_average_titles(rows),
        averages=list_averages(rows),
        average_note=AVERAGE_NOTE,
        missing_averages=describe_missing_averages(rows),
        splits_note=SPLITS_NOTE if any(row.validation_share for row in rows) else "",
        figures=figures,
        styles=styles,
        most_drawn=MAX_DRAWN,
        left_out=sum(math.isfinite(row.summary.mean) for row in rows) - len(drawn),
        comparisons=sum(_is_tested(row) for row in rows),
        **_describe_runs(records, metric),
        palettes=_PALETTES,
        css=Markup((_TEMPLATE_FOLDER / "page.css").read_text(encoding="utf-8")),
        js=Markup((_TEMPLATE_FOLDER / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs() if charts else ""),
        charts=_embed_json({"palettes": _PALETTES, "charts": charts}),
    )


def _summarise_study(rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], metric: str) -> str:
    """Return the paragraph at the top of the page."""
    variants, seeds = len(rows), sorted({record.seed for record in records})
    models, data, epochs, sizes = (list_values(records, name) for name in ("model", "data", "epochs", "imgsz"))
    states = Counter(record.state for record in records)
    counts = join_words([f"{states[state]} {state}" for state in STATES if states[state]])
    sentences = [
        f"{format_count(variants, 'variant')}, {format_count(len(seeds), 'seed')}"
        + (f" ({', '.join(map(str, seeds))})" if 0 < len(seeds) <= 10 else "")
        + (f", of {join_words(models)}" if models else "")
        + (f", on {join_words(data)}" if data else "")
        + (f", {join_words(epochs)} epochs" if epochs else "")
        + (f" at {join_words(sizes)} pixels" if sizes else "")
        + f". {format_count(len(records), 'run')}"
        + (f": {counts}." if counts else "."),
        *_describe_verdicts(rows),
        *_describe_bootstrap(rows),
    ]
    return " ".join(sentences) + f" Scores are {metric}, as fractions of 1."


def _describe_verdicts(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return sentences on which variants are better or worse than their baselines."""
    baselines = {row.setting: row.variant for row in rows if row.is_baseline}
    sentences, same, untested, unlearned = [], [], [], []
    for row in rows:
        comparison = row.comparison
        if row.is_baseline:
            continue
        if comparison is not None and comparison.verdict == NOTHING_LEARNED:
            unlearned.append(row.variant)
        elif comparison is None or not _is_tested(row):
            untested.append(row.variant)
        elif comparison.verdict in ("better", "worse"):
            sign = 1 if comparison.verdict == "better" else -1
            low, high = sorted((sign * comparison.low, sign * comparison.high))
            sentences.append(
                f"{row.variant} is {comparison.verdict} than {baselines.get(row.setting, 'the baseline')} by "
                f"{format_score(sign * comparison.difference)} ({format_score(low)} to {format_score(high)})."
            )
        else:
            same.append(row.variant)
    if len(sentences) > MAX_LISTED:
        sentences[MAX_LISTED:] = [f"For {len(sentences) - MAX_LISTED} more with a difference, see the leaderboard."]
    if same:
        sentences.insert(0, f"No difference shown for {join_words(same)}.")
    if unlearned:
        sentences.append(f"Nothing was learned by {join_words(unlearned)}, nor by the baseline: train for longer.")
    if untested:
        sentences.append(f"Nothing to judge by for {join_words(untested)}: that takes two seeds beside a baseline's.")
    return sentences


def _describe_bootstrap(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return a sentence on which variants the bootstrap over seeds and images tells from their baselines, if any."""
    verdicts = {row.variant: row.over_seeds_and_images.verdict for row in rows if row.over_seeds_and_images}
    found = []
    for verdict in ("better", "worse", NO_DIFFERENCE):
        if names := [name for name, each in verdicts.items() if each == verdict]:
            found.append(f"{verdict}: {join_words(names)}")
    return [f"By the bootstrap over seeds and images, {'; '.join(found)}."] if found else []


def _is_tested(row: LeaderboardRow) -> bool:
    """Return whether a variant has a p-value."""
    return row.comparison is not None and math.isfinite(row.comparison.p_holm)


def _list_columns(rows: Sequence[LeaderboardRow], metric: str) -> list[tuple[str, bool]]:
    """Return the titles of the leaderboard, each with whether its cells are numbers."""
    texts = ("variant", "verdict")
    titles = ["variant", "runs", metric, *_list_other_metrics(rows, metric), "difference to baseline", "p (Holm)"]
    titles += ["effect size", "verdict", "seeds for 0.005", "parameters", "GFLOPs (640)", "s/epoch", "latency (ms)"]
    return [(title, title not in texts) for title in titles]


def _list_other_metrics(rows: Sequence[LeaderboardRow], metric: str) -> list[str]:
    """Return the names of all scores other than the ranked one."""
    return list(dict.fromkeys(name for row in rows for name in row.other_scores if name != metric))


def _make_cells(
    rows: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], metric: str
) -> list[list[_Cell]]:
    """Return the cells of the leaderboard, a list per variant."""
    others = _list_other_metrics(rows, metric)
    bars = _make_bars(rows, runs, metric)
    return [_make_row_cells(row, others, bars.get(row.variant)) for row in rows]


def _make_bars(rows: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], metric: str) -> dict[str, _Bar]:
    """Return the bar of each variant with a score, all on one axis: with single runs if these are few."""
    scored = [row for row in rows if math.isfinite(row.summary.mean)]
    single = {
        row.variant: [run.scores[metric] for run in index_by_seed(runs[row.variant], metric).values()]
        for row in scored
        if row.summary.runs < MANY_RUNS
    }
    ends = [value for values in single.values() for value in values]
    ends += [value for row in scored if row.variant not in single for value in (row.summary.low, row.summary.high)]
    start, end = min(ends, default=0.0), max(ends, default=1.0)

    def locate(value: float) -> float:
        return 100 * (value - start) / ((end - start) or 1.0)

    bars = {}
    for row in scored:
        summary = row.summary
        interval = None
        if row.variant not in single:
            interval = (locate(summary.low), locate(summary.high) - locate(summary.low))
        bars[row.variant] = _Bar(locate(summary.mean), interval, tuple(map(locate, single.get(row.variant, ()))))
    return bars


def _make_row_cells(row: LeaderboardRow, others: Sequence[str], bar: _Bar | None) -> list[_Cell]:
    """Return the cells of a variant, with the bar of its scores."""
    summary, comparison = row.summary, row.comparison
    lost = {"failed": row.failed, "stopped": row.stopped, "unfinished": row.unfinished}
    score, note = format_score(summary.mean), ""
    if math.isfinite(summary.low):
        score += f" ± {format_score(summary.deviation)}"
        note = f"{format_score(summary.low)} to {format_score(summary.high)}"
    cells = [
        _Cell(row.variant, row.variant),
        _Cell(
            str(summary.runs), summary.runs, ", ".join(f"{number} {state}" for state, number in lost.items() if number)
        ),
        _Cell(score, finite_or_none(summary.mean), note, bar),
        *(
            _Cell(format_score(row.other_scores.get(name)), finite_or_none(row.other_scores.get(name)))
            for name in others
        ),
    ]
    if comparison is None:
        verdict = "baseline" if row.is_baseline else "not compared"
        cells += [_Cell(UNKNOWN, None)] * 3 + [_Cell(verdict, verdict), _Cell(UNKNOWN, None)]
    else:
        tested = math.isfinite(comparison.low)
        verdict = comparison.verdict
        interval = f"{format_score(comparison.low, '+')} to {format_score(comparison.high, '+')}" if tested else ""
        cells += [
            _Cell(format_score(comparison.difference, "+"), finite_or_none(comparison.difference), interval),
            _Cell(format_p(comparison.p_holm), finite_or_none(comparison.p_holm)),
            _Cell(format_number(comparison.effect, "{:+.2f}"), finite_or_none(comparison.effect)),
            _Cell(verdict, verdict, "" if _is_tested(row) else format_count(comparison.pairs, "pair"), kind=verdict),
            _Cell(format_number(comparison.seeds_needed, "{:,}"), finite_or_none(comparison.seeds_needed)),
        ]
    costs = (
        (row.parameters or None, "{:,}"),
        (row.gflops_640 or None, "{:.2f}"),
        (row.seconds_per_epoch, "{:.1f}"),
        (row.latency_ms, "{:.2f}"),
    )
    return cells + [_Cell(format_number(value, form), finite_or_none(value)) for value, form in costs]


def _describe_runs(records: Sequence[RunRecord], metric: str) -> dict[str, Any]:
    """Return variables of the template: what all runs have in common, in what they differ, and a row per run."""
    versions, other_versions = _split_common([record.versions for record in records if record.versions])
    arguments, differing = _split_common([record.arguments for record in records if record.arguments])
    own = [key for key in differing if key not in _RUN_SPECIFIC]
    columns = [("variant", False), ("seed", True), ("state", False), (metric, True), ("epochs", True)]
    columns += [("own arguments", False)] * bool(own or other_versions) + [("reason of failure", False)]
    rows = []
    for record in records:
        score = record.scores.get(metric)
        differs = [f"{key}={record.arguments[key]}" for key in own if key in record.arguments]
        differs += [f"{key} {record.versions[key]}" for key in other_versions if key in record.versions]
        cells = [
            _Cell(record.variant, record.variant),
            _Cell(str(record.seed), record.seed),
            _Cell(record.state, record.state, kind=record.state),
            _Cell(format_score(score), finite_or_none(score)),
            _Cell(str(record.epochs), record.epochs),
            *[_Cell(text, text) for text in [" ".join(differs)] if own or other_versions],
            _Cell(record.reason, record.reason or None),
        ]
        rows.append((cells, record.command))
    settings = {key: value for key, value in arguments.items() if key not in ("name", "project", "save_dir")}
    return {
        "versions": versions,
        "arguments": settings,
        "differing": [*own, *other_versions],
        "run_columns": columns,
        "run_rows": rows,
    }


def _split_common(mappings: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return the items that all mappings have in common, and the keys in which they differ."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    values = {key: {str(mapping.get(key, "")) for mapping in mappings} for key in keys}
    common = {key: next(iter(distinct)) for key, distinct in values.items() if len(distinct) == 1}
    return common, [key for key in values if key not in common]


def _embed_json(data: Any) -> Markup:
    """Return JSON that is safe inside a script element, with null for NaN."""
    text = json.dumps(_replace_nan(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def _replace_nan(data: Any) -> Any:
    """Return plain data with None in place of NaN and infinity."""
    if isinstance(data, dict):
        return {key: _replace_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_replace_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
