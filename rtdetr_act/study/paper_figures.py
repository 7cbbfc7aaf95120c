"""Figures of a study for a paper, with the numbers of the charts of the page."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rtdetr_act.analysis.figures import COLOURS, ONE_COLUMN, figure_style, render_figure
from rtdetr_act.evaluation.statistics import MANY_RUNS, Comparison, Summary
from rtdetr_act.study.chart_data import (
    Curve,
    choose_cost_span,
    choose_span,
    list_seed_differences,
    read_training_curves,
    select_drawn,
)
from rtdetr_act.study.charts import Style, assign_styles
from rtdetr_act.study.leaderboard import LeaderboardRow, index_by_seed
from rtdetr_act.study.pareto import GFLOPS, LATENCY, PARAMETERS, FrontPoint, find_front
from rtdetr_act.study.run_record import RunRecord

_MARKERS = {"circle": "o", "diamond": "D", "square": "s"}
_LINES = {"solid": "-", "dash": "--", "dot": ":"}
_MAX_LABEL, _LABEL_LINE = 28, 18  # characters of a name in a legend, and in a line beside a panel
# What a figure shows the score against, in the order of preference.
_COSTS = (LATENCY, GFLOPS, PARAMETERS)


def encode_figures(rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], metric: str) -> dict[str, bytes]:
    """Return the figures as PDF, by file name; those that have nothing to show are left out.

    They show the variants and the numbers of the charts of the page, with axes in percent.

    Args:
        rows: The leaderboard.
        records: The runs.
        metric: Name of the ranked score.
    """
    drawn = select_drawn(rows)
    runs: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        runs[record.variant].append(record)
    styles = assign_styles(drawn)
    figures = {
        "differences.pdf": draw_differences(drawn, runs, styles, metric),
        "cost.pdf": draw_cost(drawn, runs, styles, metric),
        "training.pdf": draw_training(drawn, runs, styles, metric),
    }
    return {name: render_figure(figure, "pdf") for name, figure in figures.items() if figure}


@figure_style()
def draw_differences(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style], metric: str
) -> Figure | None:
    """Draw the difference of each variant to its baseline, with its corrected interval, and those of single seeds.

    Args:
        drawn: The variants.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
    """
    baselines = {row.setting: row.variant for row in drawn if row.is_baseline}
    compared = [(row, row.comparison) for row in drawn if row.comparison and math.isfinite(row.comparison.difference)]
    if not compared:
        return None
    figure = Figure(figsize=(ONE_COLUMN, 0.55 + 0.3 * len(compared)))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    shown, ends = [0.0], list[float]()
    for place, (row, comparison) in enumerate(compared):
        colour = _get_colour(styles[row.variant])
        seeds = list_seed_differences(row, baselines.get(row.setting, ""), runs, metric)
        axes.plot(
            list(seeds.values()), [place + 0.24] * len(seeds), "o", color=colour, fillstyle="none", markersize=3,
            markeredgewidth=0.7,
        )  # fmt: skip
        shown += seeds.values()
        (shown if comparison.pairs >= MANY_RUNS else ends).extend([comparison.low, comparison.high])
        marker = _MARKERS[styles[row.variant].symbol]
        _draw_point(axes, (comparison.difference, place - 0.08), comparison, "x", colour, marker)
    axes.set_yticks(range(len(compared)), [_wrap_label(row.variant) for row, _ in compared], parse_math=False)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlim(*choose_span(shown, ends)[0])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(_format_points))
    axes.set_xlabel(f"difference in {metric} (points)")
    return figure


@figure_style()
def draw_cost(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style], metric: str
) -> Figure | None:
    """Draw the score of each variant against latency, or GFLOPs or parameters without it, with the Pareto front.

    Means on the front are filled, those of other variants open, and those that are shown to be worse crossed. They have
    their 95 % interval, or single runs beside them where there are fewer than five.

    Args:
        drawn: The variants.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
    """
    fronts = (find_front(drawn, runs, metric, cost) for cost in _COSTS)
    front = next((each for each in fronts if each.select("front")), None)
    if front is None:
        return None
    known = [point for point in front.points if point.cost is not None]
    summaries = {row.variant: row.summary for row in drawn}
    figure = Figure(figsize=(ONE_COLUMN, _choose_height(len(known))))
    axes = figure.subplots()
    members = front.select("front")
    costs = [point.cost for point in members if point.cost is not None]  # all of them have one
    axes.plot(costs, [point.score for point in members], color="0.5", linewidth=0.9, drawstyle="steps-post", zorder=1)
    for point in known:
        _draw_variant(axes, point, summaries[point.variant], runs[point.variant], styles[point.variant], metric)
    axes.set_xlim(*choose_cost_span([point.cost for point in known if point.cost is not None]))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(front.cost.unit)
    if front.cost is PARAMETERS:
        axes.xaxis.set_major_formatter(FuncFormatter(_format_millions))
    _finish_scores(figure, axes, metric)
    return figure


@figure_style()
def draw_training(
    drawn: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], styles: Mapping[str, Style], metric: str
) -> Figure | None:
    """Draw the score over the epochs: the mean over the finished runs of each variant, and their range.

    Args:
        drawn: The variants.
        runs: Runs of each variant.
        styles: Style of each variant.
        metric: Name of the score.
    """
    curves = read_training_curves(drawn, runs, metric).scores
    if not curves:
        return None
    figure = Figure(figsize=(ONE_COLUMN, _choose_height(len(curves))))
    axes = figure.subplots()
    for name, curve in curves.items():
        _draw_curve(axes, name, curve, styles[name])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("epoch")
    _finish_scores(figure, axes, metric)
    return figure


def _draw_variant(
    axes: Any, point: FrontPoint, summary: Summary, runs: Sequence[RunRecord], style: Style, metric: str
) -> None:
    """Draw a variant in a figure of score against cost.

    Args:
        axes: Where to draw.
        point: Where it stands.
        summary: Statistics of its score.
        runs: Its runs.
        style: Its style.
        metric: Name of the score.
    """
    assert point.cost is not None
    colour = _get_colour(style)
    interval = summary if summary.runs >= MANY_RUNS else None
    if 1 < summary.runs < MANY_RUNS:
        scores = [run.scores[metric] for run in index_by_seed(runs, metric).values()]
        axes.plot([point.cost] * len(scores), scores, ".", color=colour, markersize=3, alpha=0.6)
    place, marker = (point.cost, point.score), _MARKERS[style.symbol]
    _draw_point(axes, place, interval, "y", colour, marker, point.variant, is_open=point.status != "front")
    if point.status == "dominated":
        axes.plot([point.cost], [point.score], "x", color=colour, markersize=4, zorder=3)  # above the open marker


def _draw_curve(axes: Any, name: str, curve: Curve, style: Style) -> None:
    """Draw a curve over the epochs, with a band from the lowest run to the highest if there are several."""
    colour = _get_colour(style)
    if curve.runs > 1:
        axes.fill_between(curve.epochs, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    marker = "" if len(curve.epochs) > 1 else _MARKERS[style.symbol]
    axes.plot(
        curve.epochs, curve.mean, color=colour, linestyle=_LINES[style.dash], marker=marker, label=_shorten_label(name)
    )


def _draw_point(
    axes: Any,
    place: tuple[float, float],
    interval: Summary | Comparison | None,
    axis: str,
    colour: str,
    marker: str,
    name: str = "",
    *,
    is_open: bool = False,
) -> None:
    """Draw a point, with its interval along an axis if it has one.

    Args:
        axes: Where to draw.
        place: The point.
        interval: What has the ends `low` and `high` of the interval; None, or NaN, without one.
        axis: "x" or "y".
        colour: Its colour.
        marker: Its marker.
        name: Its name in the legend.
        is_open: Whether the marker is open. Default: False.
    """
    middle = place[0] if axis == "x" else place[1]
    ends = {}
    if interval and math.isfinite(interval.low):
        ends = {f"{axis}err": [[middle - interval.low], [interval.high - middle]]}
    axes.errorbar(
        [place[0]], [place[1]], **ends, fmt=marker, color=colour, elinewidth=0.9, capsize=2, label=_shorten_label(name),
        markerfacecolor="white" if is_open else colour,
    )  # fmt: skip


def _finish_scores(figure: Figure, axes: Any, metric: str) -> None:
    """Label the axis of scores, and put a legend above the panel."""
    axes.yaxis.set_major_formatter(FuncFormatter(_format_percent))
    axes.set_ylabel(f"{metric} (%)")
    handles, labels = axes.get_legend_handles_labels()
    # One with a band or an interval is drawn as its line or marker alone.
    legend = figure.legend(
        [getattr(handle, "lines", [handle])[0] for handle in handles],
        labels,
        loc="outside upper left",
        ncols=2 if max(map(len, labels)) > 12 else 3,
        columnspacing=1.0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _choose_height(variants: int) -> float:
    """Return the height of a figure in inches whose legend has a number of variants."""
    return 2.3 + 0.14 * math.ceil(variants / 3)


def _get_colour(style: Style) -> str:
    """Return the colour of a variant: that of the page, where c0 is black and c1 is the first of the palette."""
    return (COLOURS[-1], *COLOURS)[int(style.colour.removeprefix("c"))]


def _shorten_label(name: str) -> str:
    """Return a name as it stands in a figure."""
    return name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"


def _wrap_label(name: str) -> str:
    """Return a name in two short lines, which leave room for the panel beside them."""
    return textwrap.fill(name, _LABEL_LINE, max_lines=2, placeholder="…", break_on_hyphens=False)


def _format_percent(value: float, _: int | None = None) -> str:
    """Return a fraction of 1 as the label of an axis in percent."""
    return f"{100 * value:g}".replace("-", "−")


def _format_millions(value: float, _: int | None = None) -> str:
    """Return a number of parameters as the label of an axis."""
    return f"{value / 1e6:g} M"


def _format_points(value: float, _: int | None = None) -> str:
    """Return a difference as the label of an axis in points."""
    return f"{100 * value:+g}".replace("-", "−") if value else "0"
