"""The charts of the report, as data for Plotly. Colours are keys of the page's palettes, which `page.js` puts in."""

from __future__ import annotations

import html
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rtdetr_act.integrations.ultralytics.results import read_results
from rtdetr_act.study.formatting import finite_or_none, format_count, format_score, join_words
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.statistics import Comparison, Summary, summarise
from rtdetr_act.study.storage import CURVES_FILE, ActivationCurves, read_json

_MAX_CLASSES_HEIGHT = 680  # pixels; a taller chart fits no page of paper
_CURVE_POINTS = 81
_WIDE, _HALF, _SMALL = 680, 335, 222  # on paper, in CSS pixels: A4 less its margins in one, two and three columns


@dataclass(frozen=True)
class Style:
    """How one variant is drawn in every chart; the colour is a key of the palettes."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Figure:
    """A chart with its words; where there is nothing to draw, `traces` is empty and `text` says why."""

    title: str
    text: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 380
    print_width: int = _WIDE
    names: tuple[str, ...] = ()  # variants in its legend


@dataclass(frozen=True)
class _Curve:
    """A column of results.csv over the epochs, of all finished runs of a variant."""

    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int


def assign_styles(drawn: Sequence[LeaderboardRow]) -> dict[str, Style]:
    """Return how each variant is drawn; baselines are black, or white in the dark."""
    looks = {}
    baselines = others = 0
    for line in drawn:
        if line.is_baseline:
            looks[line.variant] = Style("c0", ("solid", "dash", "dot")[baselines % 3], "square")
            baselines += 1
        else:
            again = others // 6 % 2
            looks[line.variant] = Style(f"c{others % 6 + 1}", ("solid", "dash")[again], ("circle", "diamond")[again])
            others += 1
    return looks


def _make_layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
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
        "uirevision": "kept",  # a change of colours leaves the zoom alone
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        **more,
    }


def _make_title(text: str) -> dict[str, Any]:
    return {"text": _escape(text), "standoff": 8}


def _escape(text: str) -> str:
    """Return text in which Plotly finds neither tags of its own small HTML nor formulas for MathJax."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _wrap_label(text: str) -> str:
    """Return a name as an axis label that leaves a phone room for the chart."""
    parts = textwrap.wrap(text, 18, max_lines=2, placeholder="…", break_on_hyphens=False)
    return "<br>".join(map(_escape, parts))


def _format_hover(name: str, *rest: str) -> str:
    return "<br>".join([f"<b>{_escape(name)}</b>", *map(_escape, rest)])


def _make_error_bars(axis: str, points: Sequence[Summary | Comparison], colour: str) -> dict[str, Any]:
    """Return the intervals along an axis; nothing where no point has one."""
    if not any(math.isfinite(point.low) for point in points):
        return {}
    means = [point.mean if isinstance(point, Summary) else point.difference for point in points]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [point.high - mean for point, mean in zip(points, means, strict=True)],
        "arrayminus": [mean - point.low for point, mean in zip(points, means, strict=True)],
    }
    return {f"error_{axis}": {**bars, "color": colour, "thickness": 1.5, "width": 3}}


def draw_differences(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], looks: Mapping[str, Style], metric: str
) -> Figure:
    """Draw the difference of each variant to its baseline, with its interval and the single seeds."""
    title = "Difference to the baseline"
    baselines = {line.setting: line.variant for line in drawn if line.is_baseline}
    traces: list[dict[str, Any]] = []
    labels: list[str] = []
    for line in drawn:
        comparison = line.comparison
        if comparison is None or not math.isfinite(comparison.difference):
            continue
        row, look = len(labels), looks[line.variant]
        labels.append(_wrap_label(line.variant))
        theirs = _scores_by_seed(runs[baselines.get(line.setting, "")], metric)
        ours = _scores_by_seed(runs[line.variant], metric)
        seeds = sorted(ours.keys() & theirs.keys())
        differences = [ours[seed] - theirs[seed] for seed in seeds]
        numbers = [format_score(value, "+") for value in (comparison.difference, comparison.low, comparison.high)]
        interval = f" ({numbers[1]} to {numbers[2]})" if math.isfinite(comparison.low) else ""
        traces += [
            {
                "x": differences,
                "y": [row + 0.22] * len(seeds),
                "mode": "markers",
                "marker": {"color": look.colour, "size": 6, "opacity": 0.65, "symbol": "circle-open"},
                "hovertext": [
                    _format_hover(line.variant, f"seed {seed}: {format_score(value, '+')}")
                    for seed, value in zip(seeds, differences, strict=True)
                ],
            },
            {
                "x": [comparison.difference],
                "y": [row - 0.08],
                "mode": "markers",
                "marker": {"color": look.colour, "size": 10, "symbol": look.symbol},
                **_make_error_bars("x", [comparison], look.colour),
                "hovertext": [
                    _format_hover(line.variant, numbers[0] + interval, f"{format_count(comparison.pairs, 'pair')}")
                ],
            },
        ]
    if not labels:
        return Figure(title, "No variant has a finished seed in common with a baseline, so there is none to show.")
    layout = _make_layout(
        {
            "title": _make_title(f"difference in {metric}"),
            "zeroline": True,
            "zerolinecolor": "ink",
            "rangemode": "tozero",
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
        "Filled: the mean difference of the pairs, with its 95 % interval. Open: single seeds. "
        "The intervals are not corrected for the number of variants, the verdicts are."
    )
    return Figure(title, text, _complete_traces(traces), layout, 72 + 46 * len(labels))


def _scores_by_seed(records: Iterable[RunRecord], metric: str) -> dict[int, float]:
    scores: dict[int, float] = {}
    for record in sorted(records, key=lambda each: (each.name, str(each.folder))):  # the leaderboard counts the first
        if record.state == "done" and metric in record.scores:
            scores.setdefault(record.seed, record.scores[metric])
    return scores


def _complete_traces(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "scatter", "hoverinfo": "text", **trace} for trace in traces]


def draw_cost(
    drawn: Sequence[LeaderboardRow],
    looks: Mapping[str, Style],
    metric: str,
    noun: str,
    axis: str,
    label: str,
    form: str,
    cost: Callable[[LeaderboardRow], float | None],
) -> Figure:
    """Draw the score against the cost of a variant, which has three names, for the title, the axis and the hover."""
    title = f"{metric} against {noun}"
    known = [(line, value) for line in drawn if (value := finite_or_none(cost(line)))]
    if not known:
        return Figure(title, f"Left out: no {noun} known for any finished variant.", print_width=_HALF)
    values = [value for _, value in known]
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), 0.04 * high)  # variants of nearly equal cost must not look far apart
    start, end = max(0.0, low - pad), high + pad
    traces = []
    for (line, value), place in zip(known, _spread_out(values, (end - start) / 60), strict=True):
        summary, look = line.summary, looks[line.variant]
        interval = (
            f" ({format_score(summary.low)} to {format_score(summary.high)})" if math.isfinite(summary.low) else ""
        )
        traces.append(
            {
                "x": [place],
                "y": [summary.mean],
                "mode": "markers",
                "marker": {"color": look.colour, "size": 10, "symbol": look.symbol},
                **_make_error_bars("y", [summary], look.colour),
                "hovertext": [
                    _format_hover(
                        line.variant,
                        f"{metric} {format_score(summary.mean)}{interval}",
                        f"{label} {form.format(value)}",
                        format_count(summary.runs, "run"),
                    )
                ],
                "meta": line.variant,
            }
        )
    layout = _make_layout(
        {"title": _make_title(axis), "range": [start, end], "nticks": 6}, {"title": _make_title(metric)}
    )
    missing = [line.variant for line in drawn if line.variant not in {line.variant for line, _ in known}]
    text = "Mean over seeds, with its 95 % interval. Variants of equal cost stand side by side."
    text += f" Not known for {join_words(missing)}." if missing else ""
    return Figure(title, text, _complete_traces(traces), layout, 340, _HALF, tuple(line.variant for line, _ in known))


def _spread_out(values: Sequence[float], step: float) -> list[float]:
    """Return places at least a step apart, near their values and in their order, so that no interval covers another.

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
    places = [0.0] * len(values)
    for group in groups:
        middle = fmean(values[each] for each in group)
        for rank, index in enumerate(group):
            places[index] = middle + step * (rank - (len(group) - 1) / 2)
    return places


def draw_training(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], looks: Mapping[str, Style], metric: str
) -> list[Figure]:
    """Draw score and training loss over the epochs, a mean and a band for each variant."""
    figures = []
    histories = {
        line.variant: [_read_epochs(record.folder, metric) for record in runs[line.variant] if record.state == "done"]
        for line in drawn
    }
    for column, title in enumerate((f"{metric} on the validation images", "Training loss")):
        curves = {
            name: curve
            for name, found in histories.items()
            if (
                curve := _aggregate_runs([{epoch: pair[column] for epoch, pair in run.items()} for run in found])
            ).epochs
        }
        if not curves:
            figures.append(Figure(title, "Left out: no finished run has it in its results.csv.", print_width=_HALF))
            continue
        traces = [trace for name, curve in curves.items() for trace in _make_curve_traces(name, curve, looks[name])]
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


def _read_epochs(folder: Path, metric: str) -> dict[int, tuple[float, float]]:
    """Return score and training loss of each epoch of a results.csv."""
    return {epoch.number: (epoch.scores.get(metric, math.nan), epoch.loss) for epoch in read_results(folder).epochs}


def _aggregate_runs(runs: Sequence[Mapping[int, float]]) -> _Curve:
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for epoch, value in run.items():
            if math.isfinite(value):
                values[epoch].append(value)
    epochs = sorted(values)
    return _Curve(
        epochs,
        [_round_digits(fmean(values[epoch])) for epoch in epochs],
        [_round_digits(min(values[epoch])) for epoch in epochs],
        [_round_digits(max(values[epoch])) for epoch in epochs],
        sum(bool(run) for run in runs),
    )


def _round_digits(value: float) -> float:
    return float(f"{value:.5g}")  # more digits than a screen shows, a third of the bytes


def _make_curve_traces(name: str, curve: _Curve, look: Style) -> list[dict[str, Any]]:
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
                "fillcolor": look.colour,
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
            "line": {"color": look.colour, "width": 2, "dash": look.dash},
            "marker": {"color": look.colour, "symbol": look.symbol},
            "text": _format_hover(name),
            "hovertemplate": template + "<extra></extra>",
            "meta": name,
        }
    )
    return traces


def draw_classes(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], looks: Mapping[str, Style]
) -> Figure:
    """Draw the score of each class, of those in which variants differ most."""
    title = "Score of each class"
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in drawn:
        for record in runs[line.variant]:
            for name, value in record.classes.items() if record.state == "done" else ():
                if math.isfinite(value):
                    found[name][line.variant].append(value)
    if not found:
        return Figure(title, "Left out: no finished run has recorded the scores of single classes.")
    variants = [line.variant for line in drawn if any(line.variant in scores for scores in found.values())]
    row_height = max(30, 7 * len(variants) + 10)
    means = {name: [fmean(values) for values in scores.values()] for name, scores in found.items()}
    widest = sorted(found, key=lambda name: min(means[name]) - max(means[name]))[: _MAX_CLASSES_HEIGHT // row_height]
    names = [name for name in found if name in widest]
    traces: list[dict[str, Any]] = []
    for index, variant in enumerate(variants):
        shift = 0.72 * ((index + 0.5) / len(variants) - 0.5)
        rows = [(row, name) for row, name in enumerate(names) if variant in found[name]]
        summaries = [summarise(found[name][variant]) for _, name in rows]
        look = looks[variant]
        traces.append(
            {
                "x": [summary.mean for summary in summaries],
                "y": [row + shift for row, _ in rows],
                "mode": "markers",
                "marker": {"color": look.colour, "size": 8, "symbol": look.symbol},
                **_make_error_bars("x", summaries, look.colour),
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
    text = "mAP50-95 of the best checkpoint, mean over seeds with its 95 % interval."
    if len(names) < len(found):
        text += f" Of {len(found)} classes, the {len(names)} in which the variants differ most."
    return Figure(title, text, _complete_traces(traces), layout, 64 + len(names) * row_height, names=tuple(variants))


def draw_activations(drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]]) -> list[Figure]:
    """Draw what learned activations look like, a chart for each variant."""
    figures = []
    for line in drawn:
        for record in runs[line.variant]:
            shapes = read_json(record.folder / CURVES_FILE, ActivationCurves) if record.state == "done" else None
            traces = _make_activation_traces(shapes) if shapes else []
            if traces:
                text = f"{format_count(sum('meta' not in trace for trace in traces), 'site')}, seed {record.seed}"
                layout = _make_layout(
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                )
                figures.append(Figure(line.variant, text, _complete_traces(traces), layout, 250, _SMALL))
                break
    return figures


def _make_activation_traces(shapes: ActivationCurves) -> list[dict[str, Any]]:
    step = max(1, (len(shapes.x) - 1) // (_CURVE_POINTS - 1))
    x = _subsample(shapes.x, step)
    traces: list[dict[str, Any]] = []
    for index, site in enumerate(shapes.sites):
        depth = round(7 * index / max(1, len(shapes.sites) - 1))
        hover = _format_hover(site.name, site.activation)
        line = {"color": f"d{depth}", "width": 1}
        traces.append({"x": x, "y": _subsample(site.after, step), "line": line, "hovertext": hover})
    starts = dict.fromkeys(tuple(_subsample(site.before, step)) for site in shapes.sites)
    for start in starts:
        dashed = {"color": "ink", "width": 1.5, "dash": "dash"}
        traces.append({"x": x, "y": list(start), "line": dashed, "hovertext": "before training", "meta": "before"})
    return [{"mode": "lines", **trace} for trace in traces]


def _subsample(values: Sequence[float | None], step: int) -> list[float | None]:
    return [None if value is None else _round_digits(value) for value in values[::step]]
