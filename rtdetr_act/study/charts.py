"""Charts of the HTML report as Plotly data. Colours are keys of the palettes of the page, which `page.js` resolves."""

from __future__ import annotations

import html
import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rtdetr_act.evaluation.statistics import MANY_RUNS, Summary, summarise_scores
from rtdetr_act.formatting import format_count, format_score, join_words
from rtdetr_act.study.chart_data import (
    Curve,
    choose_cost_span,
    choose_span,
    list_seed_differences,
    read_training_curves,
    round_digits,
)
from rtdetr_act.study.leaderboard import LeaderboardRow, index_by_seed
from rtdetr_act.study.pareto import Cost, Front, FrontPoint, Status, describe_front, find_front
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.storage import CURVES_FILE, ActivationCurves, read_json

_MAX_CLASSES_HEIGHT = 680  # pixels; a taller chart does not fit on a printed page
_CURVE_POINTS = 81
_WIDE, _HALF, _SMALL = 680, 335, 222  # widths in print, in CSS pixels: A4 without margins in one, two and three columns
_STATUS_WORDS: dict[Status, str] = {"front": "on the front", "tied": "tied with the front", "dominated": "dominated"}


@dataclass(frozen=True)
class Style:
    """Style of a variant in all charts.

    Attributes:
        colour: Key of the palettes.
        dash: Plotly's `line.dash`.
        symbol: Plotly's `marker.symbol`.
    """

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption.

    Attributes:
        title: Title of the caption.
        text: Text of the caption; if there is nothing to draw, the reason.
        traces: Plotly's `data`; empty if there is nothing to draw.
        layout: Plotly's `layout`.
        height: Height in CSS pixels.
        print_width: Width in print, in CSS pixels.
        names: Variants in the legend.
        notes: Lines of text below the chart.
    """

    title: str
    text: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 380
    print_width: int = _WIDE
    names: tuple[str, ...] = ()
    notes: Sequence[str] = ()


def assign_styles(drawn: Sequence[LeaderboardRow]) -> dict[str, Style]:
    """Return the style of each variant; baselines are black, or white in the dark scheme.

    Args:
        drawn: Variants in the charts.
    """
    styles = {}
    baselines = others = 0
    for row in drawn:
        if row.is_baseline:
            styles[row.variant] = Style("c0", ("solid", "dash", "dot")[baselines % 3], "square")
            baselines += 1
        else:
            again = others // 6 % 2
            styles[row.variant] = Style(f"c{others % 6 + 1}", ("solid", "dash")[again], ("circle", "diamond")[again])
            others += 1
    return styles


def _make_layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the Plotly layout of a chart, with options of the x axis, of the y axis and of the layout."""
    axis = {"gridcolor": "rule", "linecolor": "rule", "zeroline": False, "automargin": True}
    axis |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    label = {"bgcolor": "panel", "bordercolor": "rule", "font": {"color": "ink", "size": 12}, "align": "left"}
    return {
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": "quiet"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "quiet", "activecolor": "ink"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": label,
        "uirevision": "kept",  # keeps the zoom when the colour scheme changes
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        **more,
    }


def _make_title(text: str) -> dict[str, Any]:
    """Return the title of an axis."""
    return {"text": _escape(text), "standoff": 8}


def _escape(text: str) -> str:
    """Return text without HTML tags and MathJax formulas that Plotly would interpret."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _wrap_label(text: str) -> str:
    """Return a name as an axis label of two short lines, which leaves room for the chart on a phone."""
    parts = textwrap.wrap(text, 18, max_lines=2, placeholder="…", break_on_hyphens=False)
    return "<br>".join(map(_escape, parts))


def _format_hover(name: str, *rest: str) -> str:
    """Return hover text with a bold first line."""
    return "<br>".join([f"<b>{_escape(name)}</b>", *map(_escape, rest)])


def _make_error_bars(
    axis: str, means: Sequence[float], intervals: Sequence[tuple[float, float]], colour: str
) -> dict[str, Any]:
    """Return the option of a trace with intervals along an axis, where they are known; {} if none is."""
    if not any(math.isfinite(low) for low, _ in intervals):
        return {}
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for mean, (_, high) in zip(means, intervals, strict=True)],
        "arrayminus": [mean - low for mean, (low, _) in zip(means, intervals, strict=True)],
    }
    return {f"error_{axis}": {**bars, "color": colour, "thickness": 1.5, "width": 3}}


def _make_mean_bars(axis: str, summaries: Sequence[Summary], colour: str) -> dict[str, Any]:
    """Return the option of a trace with the intervals of means over many runs; {} if there are none."""
    unknown = (math.nan, math.nan)
    intervals = [(each.low, each.high) if each.runs >= MANY_RUNS else unknown for each in summaries]
    return _make_error_bars(axis, [each.mean for each in summaries], intervals, colour)


def _make_run_trace(name: str, colour: str, size: int) -> dict[str, Any]:
    """Return the options of a trace of single runs, drawn where they are too few for an interval."""
    return {"mode": "markers", "marker": {"color": colour, "size": size, "opacity": 0.6}, "meta": name}


def _describe_spread(runs: Sequence[int]) -> str:
    """Return the sentence of a caption on how charts show the spread of means over some numbers of runs."""
    interval, single = "with its 95 % interval", "single runs as small dots"
    if not any(1 < each < MANY_RUNS for each in runs):
        return f"Mean over seeds, {interval}." if any(each > 1 for each in runs) else "One run of each variant."
    if any(each >= MANY_RUNS for each in runs):
        return f"Mean over seeds, {interval}; {single} where there are fewer than {MANY_RUNS}."
    return f"Mean over seeds, {single}."


def draw_differences(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style], metric: str
) -> Figure:
    """Return a chart of the difference of each variant to its baseline, with intervals and single seeds.

    Args:
        drawn: Variants in the chart.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
    """
    title = "Difference to the baseline"
    baselines = {row.setting: row.variant for row in drawn if row.is_baseline}
    traces: list[dict[str, Any]] = []
    labels: list[str] = []
    shown = [0.0]
    ends: list[float] = []
    for row in drawn:
        comparison = row.comparison
        if comparison is None or not math.isfinite(comparison.difference):
            continue
        position, style = len(labels), styles[row.variant]
        labels.append(_wrap_label(row.variant))
        differences = list_seed_differences(row, baselines.get(row.setting, ""), runs, metric)
        shown += differences.values()
        (shown if comparison.pairs >= MANY_RUNS else ends).extend([comparison.low, comparison.high])
        numbers = [format_score(value, "+") for value in (comparison.difference, comparison.low, comparison.high)]
        interval = f" ({numbers[1]} to {numbers[2]})" if math.isfinite(comparison.low) else ""
        traces += [
            {
                "x": list(differences.values()),
                "y": [position + 0.22] * len(differences),
                "mode": "markers",
                "marker": {"color": style.colour, "size": 6, "opacity": 0.65, "symbol": "circle-open"},
                "hovertext": [
                    _format_hover(row.variant, f"seed {seed}: {format_score(value, '+')}")
                    for seed, value in differences.items()
                ],
            },
            {
                "x": [comparison.difference],
                "y": [position - 0.08],
                "mode": "markers",
                "marker": {"color": style.colour, "size": 10, "symbol": style.symbol},
                **_make_error_bars("x", [comparison.difference], [(comparison.low, comparison.high)], style.colour),
                "hovertext": [
                    _format_hover(row.variant, numbers[0] + interval, f"{format_count(comparison.pairs, 'pair')}")
                ],
            },
        ]
    if not labels:
        return Figure(title, "No variant has a finished seed in common with a baseline, so there is none to show.")
    span, is_cut = choose_span(shown, ends)
    layout = _make_layout(
        {
            "title": _make_title(f"difference in {metric}"),
            "zeroline": True,
            "zerolinecolor": "ink",
            "range": span,
        },
        {
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "range": [len(labels) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
        },
    )
    text = (
        "Filled: the mean difference of the pairs, with its interval, corrected for the number of variants as the "
        "verdicts are. Open: single seeds."
    )
    if is_cut:
        text += f" Intervals of fewer than {MANY_RUNS} pairs that reach the edge go on beyond it."
    return Figure(title, text, _complete_traces(traces), layout, 72 + 46 * len(labels))


def _complete_traces(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return traces with the options that all have in common."""
    return [{"type": "scatter", "hoverinfo": "text", **trace} for trace in traces]


def draw_cost(
    drawn: Sequence[LeaderboardRow],
    runs: Mapping[str, Sequence[RunRecord]],
    styles: Mapping[str, Style],
    metric: str,
    cost: Cost,
) -> Figure:
    """Return a chart of score against cost, with the Pareto front.

    Args:
        drawn: Variants in the chart.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
        cost: The cost.
    """
    title = f"{metric} against {cost.name}"
    front = find_front(drawn, runs, metric, cost)
    rows = {row.variant: row for row in drawn}
    known = [point for point in front.points if point.status != "unknown"]
    values = [point.cost for point in known if point.cost is not None]  # all of them have one
    if not values:
        return Figure(title, f"Left out: no {cost.name} known for any finished variant.", print_width=_HALF)
    start, end = choose_cost_span(values)
    names = tuple(point.variant for point in known)
    positions = dict(zip(names, _spread_out(values, (end - start) / 60), strict=True))
    traces = [_make_front_trace(front, positions)] if len(front.select("front")) > 1 else []
    for point in known:
        scores = [run.scores[metric] for run in index_by_seed(runs[point.variant], metric).values()]
        traces += _make_cost_traces(
            point, rows[point.variant].summary, scores, positions[point.variant], styles[point.variant], metric, cost
        )
    layout = _make_layout(
        {"title": _make_title(cost.unit), "range": [start, end], "nticks": 6}, {"title": _make_title(metric)}
    )
    missing = [row.variant for row in drawn if row.variant not in positions]
    text = f"{_describe_spread([point.runs for point in known])} {_describe_symbols(front)}"
    text += f" Not known for {join_words(missing)}." if missing else ""
    return Figure(title, text, _complete_traces(traces), layout, 340, _HALF, names, describe_front(front))


def _make_front_trace(front: Front, positions: Mapping[str, float]) -> dict[str, Any]:
    """Return the trace of the line that joins the variants on the front, given their positions along the axis."""
    members = sorted(front.select("front"), key=lambda point: positions[point.variant])
    return {
        "x": [positions[point.variant] for point in members],
        "y": [point.score for point in members],
        "mode": "lines",
        "line": {"color": "quiet", "width": 1.5, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _make_cost_traces(
    point: FrontPoint,
    summary: Summary,
    scores: Sequence[float],
    position: float,
    style: Style,
    metric: str,
    cost: Cost,
) -> list[dict[str, Any]]:
    """Return the traces of a variant in a chart of score against cost: its runs, if they are few, and their mean."""
    interval = f" ({format_score(summary.low)} to {format_score(summary.high)})" if math.isfinite(summary.low) else ""
    hover = _format_hover(
        point.variant,
        f"{metric} {format_score(summary.mean)}{interval}",
        f"{cost.name} {cost.form.format(point.cost)}",
        f"{format_count(summary.runs, 'run')}, {_STATUS_WORDS[point.status]}",
    )
    traces: list[dict[str, Any]] = []
    if 1 < len(scores) < MANY_RUNS:
        dots = _make_run_trace(point.variant, style.colour, 5)
        traces.append({**dots, "x": [position] * len(scores), "y": scores, "hovertext": [hover] * len(scores)})
    symbol = style.symbol + ("-x" if point.status == "dominated" else "")
    fill = style.colour if point.status == "front" else "paper"
    traces.append(
        {
            "x": [position],
            "y": [summary.mean],
            "mode": "markers",
            "marker": {"color": fill, "size": 10, "symbol": symbol, "line": {"color": style.colour, "width": 1.5}},
            **_make_mean_bars("y", [summary], style.colour),
            "hovertext": [hover],
            "meta": point.variant,
        }
    )
    return traces


def _describe_symbols(front: Front) -> str:
    """Return the sentences of a caption on how a chart shows the front."""
    parts = ["Filled: on the Pareto front, none scores more at no more cost."]
    if front.select("tied"):
        parts.append("Open: tied with it, not shown to be worse.")
    if front.select("dominated"):
        parts.append("Crossed: dominated, shown to be worse.")
    if front.cost.tolerance:
        parts.append(f"Costs that differ by {100 * front.cost.tolerance:g} % or less count as equal.")
    else:
        parts.append("Variants of equal cost stand side by side.")
    return " ".join(parts)


def _spread_out(values: Sequence[float], step: float) -> list[float]:
    """Return positions in the order of some values, close to them but at least a step apart, to avoid overlaps.

    >>> _spread_out([5.0, 1.0, 1.0, 9.0], 2.0)
    [5.0, 0.0, 2.0, 9.0]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        groups.append([index])
        while len(groups) > 1:
            left, right = (fmean(values[each] for each in group) for group in groups[-2:])
            if right - left >= step * (len(groups[-2]) + len(groups[-1])) / 2:
                break
            last = groups.pop()
            groups[-1] += last
    positions = [0.0] * len(values)
    for group in groups:
        middle = fmean(values[each] for each in group)
        for rank, index in enumerate(group):
            positions[index] = middle + step * (rank - (len(group) - 1) / 2)
    return positions


def draw_training(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style], metric: str
) -> list[Figure]:
    """Return charts of score and training loss over the epochs, with mean and range over the runs of each variant.

    Args:
        drawn: Variants in the charts.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
    """
    figures = []
    found = read_training_curves(drawn, runs, metric)
    parts = ((f"{metric} on the validation images", found.scores), ("Training loss", found.losses))
    for column, (title, curves) in enumerate(parts):
        if not curves:
            figures.append(Figure(title, "Left out: no finished run has it in its results.csv.", print_width=_HALF))
            continue
        traces = [trace for name, curve in curves.items() for trace in _make_curve_traces(name, curve, styles[name])]
        text = (
            "Mean over the finished seeds that reached the epoch; the band runs from the lowest seed to the highest."
            if column == 0
            else "Sum of all parts of the loss, drawn likewise. Its scale depends on the model and its settings."
        )
        layout = _make_layout(
            {"title": _make_title("epoch")}, {"title": _make_title(metric if column == 0 else "loss")}
        )
        figures.append(Figure(title, text, _complete_traces(traces), layout, 340, _HALF, tuple(curves)))
    return figures


def _make_curve_traces(name: str, curve: Curve, style: Style) -> list[dict[str, Any]]:
    """Return the traces of a curve over the epochs: a band if there are several runs, and the mean."""
    traces: list[dict[str, Any]] = []
    template = "%{text}<br>epoch %{x}: %{y:.4g}"
    if curve.runs > 1:
        template += "<br>%{customdata[0]:.4g} to %{customdata[1]:.4g}"
        traces.append(
            {
                "x": curve.epochs + curve.epochs[::-1],
                "y": curve.high + curve.low[::-1],
                "mode": "lines",
                "line": {"width": 0},
                "fill": "toself",
                "fillcolor": style.colour,
                "opacity": 0.14,
                "hoverinfo": "skip",
                "meta": name,
            }
        )
    traces.append(
        {
            "x": curve.epochs,
            "y": curve.mean,
            "customdata": [list(pair) for pair in zip(curve.low, curve.high, strict=True)],
            "mode": "lines" if len(curve.epochs) > 1 else "markers",
            "line": {"color": style.colour, "width": 2, "dash": style.dash},
            "marker": {"color": style.colour, "symbol": style.symbol},
            "text": _format_hover(name),
            "hovertemplate": template + "<extra></extra>",
            "meta": name,
        }
    )
    return traces


def draw_classes(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style]
) -> Figure:
    """Return a chart of the score of each class, limited to the classes in which the variants differ most.

    Args:
        drawn: Variants in the chart.
        runs: Runs of each variant.
        styles: Style of each variant.
    """
    title = "Score of each class"
    scores_by_class: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in drawn:
        for record in runs[row.variant]:
            for name, value in record.classes.items() if record.state == "done" else ():
                if math.isfinite(value):
                    scores_by_class[name][row.variant].append(value)
    if not scores_by_class:
        return Figure(title, "Left out: no finished run has recorded the scores of single classes.")
    shares = {row.variant: row.validation_share for row in drawn}
    variants = [row.variant for row in drawn if any(row.variant in scores for scores in scores_by_class.values())]
    row_height = max(30, 7 * len(variants) + 10)
    means = {name: [fmean(values) for values in scores.values()] for name, scores in scores_by_class.items()}
    widest = sorted(scores_by_class, key=lambda name: min(means[name]) - max(means[name]))[
        : _MAX_CLASSES_HEIGHT // row_height
    ]
    names = [name for name in scores_by_class if name in widest]
    traces: list[dict[str, Any]] = []
    for index, variant in enumerate(variants):
        shift = 0.72 * ((index + 0.5) / len(variants) - 0.5)
        rows = [(row, name) for row, name in enumerate(names) if variant in scores_by_class[name]]
        summaries = [summarise_scores(scores_by_class[name][variant], shares[variant]) for _, name in rows]
        style = styles[variant]
        single = [
            (value, row + shift)
            for row, name in rows
            for value in scores_by_class[name][variant]
            if 1 < len(scores_by_class[name][variant]) < MANY_RUNS
        ]
        if single:
            dots = _make_run_trace(variant, style.colour, 4)
            x, y = zip(*single, strict=True)
            traces.append({**dots, "x": x, "y": y, "hoverinfo": "skip"})
        traces.append(
            {
                "x": [summary.mean for summary in summaries],
                "y": [row + shift for row, _ in rows],
                "mode": "markers",
                "marker": {"color": style.colour, "size": 8, "symbol": style.symbol},
                **_make_mean_bars("x", summaries, style.colour),
                "hovertext": [
                    _format_hover(
                        variant,
                        f"{name}: {format_score(summary.mean)}",
                        *[f"{format_score(summary.low)} to {format_score(summary.high)}"] * math.isfinite(summary.low),
                    )
                    for (_, name), summary in zip(rows, summaries, strict=True)
                ],
                "meta": variant,
            }
        )
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": {"color": "rule", "width": 1}}
    layout = _make_layout(
        {"title": _make_title("mAP50-95"), "side": "bottom"},
        {
            "tickvals": list(range(len(names))),
            "ticktext": [_wrap_label(name) for name in names],
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
        },
        shapes=[{**rule, "y0": row + 0.5, "y1": row + 0.5} for row in range(len(names) - 1)],
    )
    height = 72 + max(64, len(names) * row_height)  # Plotly shrinks no chart below 64 pixels to make room for its title
    numbers = [len(values) for scores in scores_by_class.values() for values in scores.values()]
    text = f"mAP50-95 of the best checkpoint. {_describe_spread(numbers)}"
    if len(names) < len(scores_by_class):
        text += f" Of {len(scores_by_class)} classes, the {len(names)} in which the variants differ most."
    return Figure(title, text, _complete_traces(traces), layout, height, names=tuple(variants))


def draw_activations(drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]]) -> list[Figure]:
    """Return charts of learned activations before and after training, one for each variant that has any.

    Args:
        drawn: Variants to consider.
        runs: Runs of each variant, the first finished of which is drawn.

    Raises:
        InputError: The curves of a run are damaged.
    """
    figures = []
    for row in drawn:
        for record in runs[row.variant]:
            curves = read_json(record.folder / CURVES_FILE, ActivationCurves) if record.state == "done" else None
            traces = _make_activation_traces(curves) if curves else []
            if traces:
                text = f"{format_count(sum('meta' not in trace for trace in traces), 'site')}, seed {record.seed}"
                layout = _make_layout(
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                )
                figures.append(Figure(row.variant, text, _complete_traces(traces), layout, 250, _SMALL))
                break
    return figures


def _make_activation_traces(curves: ActivationCurves) -> list[dict[str, Any]]:
    """Return the traces of learned activations: each distinct initial curve, and the final curve of each site."""
    step = max(1, (len(curves.x) - 1) // (_CURVE_POINTS - 1))
    x = _subsample(curves.x, step)
    traces: list[dict[str, Any]] = []
    for index, site in enumerate(curves.sites):
        depth = round(7 * index / max(1, len(curves.sites) - 1))
        hover = _format_hover(site.name, site.activation)
        line = {"color": f"d{depth}", "width": 1}
        traces.append({"x": x, "y": _subsample(site.after, step), "line": line, "hovertext": hover})
    starts = dict.fromkeys(tuple(_subsample(site.before, step)) for site in curves.sites)
    for start in starts:
        dashed = {"color": "ink", "width": 1.5, "dash": "dash"}
        traces.append({"x": x, "y": list(start), "line": dashed, "hovertext": "before training", "meta": "before"})
    return [{"mode": "lines", **trace} for trace in traces]


def _subsample(values: Sequence[float | None], step: int) -> list[float | None]:
    """Return every `step`-th value, rounded."""
    return [None if value is None else round_digits(value) for value in values[::step]]
