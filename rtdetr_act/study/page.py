"""The study's report: one HTML file that needs nothing else, for a screen, a phone or paper."""

from __future__ import annotations

import csv
import html
import json
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rtdetr_act.study.folder import SHAPES_FILE, read_json, write_atomically
from rtdetr_act.study.leaderboard import Line
from rtdetr_act.study.records import STATES, Record
from rtdetr_act.study.statistics import Comparison, Summary, summarise

_HERE = Path(__file__).parent
_MOST_DRAWN = 12  # variants beside the baselines: six colours, each with two dashes and two symbols
_MOST_NAMED = 12
_CLASSES_HEIGHT = 680  # pixels; a taller chart fits no page of paper
_CURVE_POINTS = 81
_WIDE, _HALF, _SMALL = 680, 335, 222  # on paper, in CSS pixels: A4 less its margins in one, two and three columns
_NONE = "–"
# Where a run is kept, or what tells seeds apart: no argument in which variants differ.
_NOT_SETTINGS = ("name", "project", "save_dir", "exist_ok", "resume", "seed")

# Okabe-Ito as in `rtdetr_act.plot` (importing that brings torch), without yellow; the baseline is the black one. The
# dark scheme has the same hues, lighter. d0 to d7 are viridis, less the end that the paper would swallow.
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
class _Look:
    """How one variant is drawn in every chart; the colour is a key of the palettes."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class _Figure:
    """A chart with its words; where there is nothing to draw, `traces` is empty and `text` says why."""

    title: str
    text: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 380
    print_width: int = _WIDE
    names: tuple[str, ...] = ()  # variants in its legend


@dataclass(frozen=True)
class _Cell:
    """What stands in a table, and what it is sorted by; a cell without a key comes last."""

    text: str
    key: float | str | None
    note: str = ""
    bar: tuple[float, float, float] | None = None  # interval's start, its width and the mean, in percent
    kind: str = ""


@dataclass(frozen=True)
class _Curve:
    """A column of results.csv over the epochs, of all finished runs of a variant."""

    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int


def write_page(
    lines: Sequence[Line], records: Sequence[Record], path: Path, *, title: str, metric: str, latency_note: str = ""
) -> Path:
    """Write the report of a study.

    All that comes from files is shown as text, whatever it holds.

    Args:
        lines: The leaderboard, in the order to show.
        records: The runs. Curves and shapes are read from the folders of those that are drawn: the 12 best variants and
            the baselines they are compared with.
        path: HTML file to write; it is replaced whole or not at all.
        title: Heading of the page.
        metric: The headline score, "mAP50-95" or "top1".
        latency_note: A sentence on how latency was measured.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written.
    """
    drawn = _choose_drawn(lines)
    looks = _assign_looks(drawn)
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[record.variant].append(record)
    difference = _draw_differences(drawn, runs, looks, metric)
    costs = [
        _draw_cost(drawn, looks, metric, "latency", "ms per image", "latency", "{:.2f} ms", lambda line: line.latency),
        _draw_cost(
            drawn, looks, metric, "parameters", "parameters", "parameters", "{:,.0f}", lambda line: line.parameters
        ),
    ]
    curves = _draw_training(drawn, runs, looks, metric)
    classes = _draw_classes(drawn, runs, looks)
    shapes = _draw_shapes(drawn, runs)
    figures = {"difference": [difference], "costs": costs, "curves": curves, "classes": [classes], "shapes": shapes}
    numbered = {
        f"{section}-{index}": figure
        for section, members in figures.items()
        for index, figure in enumerate(members)
        if figure.traces
    }
    charts = {key: {"data": figure.traces, "layout": figure.layout} for key, figure in numbered.items()}
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html.j2").render(
        title=title,
        summary=_summarise_study(lines, records, metric),
        metric=metric,
        latency_note=latency_note,
        columns=_name_columns(lines, metric),
        rows=_fill_rows(lines, metric),
        figures=figures,
        looks=looks,
        most_drawn=_MOST_DRAWN,
        left_out=sum(math.isfinite(line.summary.mean) for line in lines) - len(drawn),
        comparisons=sum(_is_tested(line) for line in lines),
        **_describe_runs(records, metric),
        palettes=_PALETTES,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs() if charts else ""),
        charts=_embed_json({"palettes": _PALETTES, "charts": charts}),
    )
    write_atomically(path, text.encode())
    return path


def _choose_drawn(lines: Sequence[Line]) -> list[Line]:
    scored = [line for line in lines if math.isfinite(line.summary.mean)]
    others = [line for line in scored if not line.is_baseline]
    best = sorted(others, key=lambda line: -line.summary.mean)[:_MOST_DRAWN]
    settings = {line.setting for line in best}
    names = {line.variant for line in best}
    names |= {line.variant for line in scored if line.is_baseline and (not best or line.setting in settings)}
    return [line for line in scored if line.variant in names]


def _assign_looks(drawn: Sequence[Line]) -> dict[str, _Look]:
    looks = {}
    baselines = others = 0
    for line in drawn:
        if line.is_baseline:
            looks[line.variant] = _Look("c0", ("solid", "dash", "dot")[baselines % 3], "square")
            baselines += 1
        else:
            again = others // 6 % 2
            looks[line.variant] = _Look(f"c{others % 6 + 1}", ("solid", "dash")[again], ("circle", "diamond")[again])
            others += 1
    return looks


# Words and tables


def _summarise_study(lines: Sequence[Line], records: Sequence[Record], metric: str) -> str:
    variants, seeds = len(lines), sorted({record.seed for record in records})
    data = sorted({str(record.arguments["data"]) for record in records if record.arguments.get("data")})
    states = Counter(record.state for record in records)
    counts = _enumerate([f"{states[state]} {state}" for state in STATES if states[state]])
    sentences = [
        f"{_count(variants, 'variant')}, {_count(len(seeds), 'seed')}"
        + (f" ({', '.join(map(str, seeds))})" if 0 < len(seeds) <= 10 else "")
        + (f", on {_enumerate(data)}" if data else "")
        + f". {_count(len(records), 'run')}"
        + (f": {counts}." if counts else "."),
        *_tell_verdicts(lines),
    ]
    return " ".join(sentences) + f" Scores are {metric}, as fractions of 1."


def _tell_verdicts(lines: Sequence[Line]) -> list[str]:
    baselines = {line.setting: line.variant for line in lines if line.is_baseline}
    sentences, same, untested = [], [], []
    for line in lines:
        comparison = line.comparison
        if line.is_baseline:
            continue
        if comparison is None or not _is_tested(line):
            untested.append(line.variant)
        elif comparison.verdict in ("better", "worse"):
            sign = 1 if comparison.verdict == "better" else -1
            low, high = sorted((sign * comparison.low, sign * comparison.high))
            sentences.append(
                f"{line.variant} is {comparison.verdict} than {baselines.get(line.setting, 'the baseline')} by "
                f"{_score(sign * comparison.difference)} ({_score(low)} to {_score(high)})."
            )
        else:
            same.append(line.variant)
    if len(sentences) > _MOST_NAMED:
        sentences[_MOST_NAMED:] = [f"For {len(sentences) - _MOST_NAMED} more with a difference, see the leaderboard."]
    if same:
        sentences.insert(0, f"No difference shown for {_enumerate(same)}.")
    if untested:
        sentences.append(f"Nothing to judge by for {_enumerate(untested)}: that takes two seeds beside a baseline's.")
    return sentences


def _is_tested(line: Line) -> bool:
    return line.comparison is not None and math.isfinite(line.comparison.adjusted)


def _enumerate(words: Sequence[str]) -> str:
    shown = list(words[:_MOST_NAMED])
    if len(words) > len(shown):
        return f"{', '.join(shown)} and {len(words) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _name_columns(lines: Sequence[Line], metric: str) -> list[tuple[str, bool]]:
    """Return titles, and whether their cells are numbers."""
    texts = ("variant", "verdict")
    titles = ["variant", "runs", metric, *_other_scores(lines, metric), "difference to baseline", "p (Holm)"]
    titles += ["effect size", "verdict", "seeds for 0.005", "parameters", "GFLOPs", "s/epoch", "latency (ms)"]
    return [(title, title not in texts) for title in titles]


def _other_scores(lines: Sequence[Line], metric: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.others if name != metric))


def _fill_rows(lines: Sequence[Line], metric: str) -> list[list[_Cell]]:
    ends = [value for line in lines for value in (line.summary.low, line.summary.high, line.summary.mean)]
    ends = [value for value in ends if math.isfinite(value)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    others = _other_scores(lines, metric)
    return [_fill_row(line, others, low, (high - low) or 1.0) for line in lines]


def _fill_row(line: Line, others: Sequence[str], start: float, width: float) -> list[_Cell]:
    summary, comparison = line.summary, line.comparison
    lost = {"failed": line.failed, "stopped": line.stopped, "unfinished": line.unfinished}
    score, note, bar = _score(summary.mean), "", None
    if math.isfinite(summary.low):
        score += f" ± {_score(summary.deviation)}"
        note = f"{_score(summary.low)} to {_score(summary.high)}"
        places = [100 * (value - start) / width for value in (summary.low, summary.high, summary.mean)]
        bar = (places[0], places[1] - places[0], places[2])
    cells = [
        _Cell(line.variant, line.variant),
        _Cell(
            str(summary.runs), summary.runs, ", ".join(f"{number} {state}" for state, number in lost.items() if number)
        ),
        _Cell(score, _finite(summary.mean), note, bar),
        *(_Cell(_score(line.others.get(name)), _finite(line.others.get(name))) for name in others),
    ]
    if comparison is None:
        verdict = "baseline" if line.is_baseline else "not compared"
        cells += [_Cell(_NONE, None)] * 3 + [_Cell(verdict, verdict), _Cell(_NONE, None)]
    else:
        tested = math.isfinite(comparison.low)
        verdict = comparison.verdict
        interval = f"{_score(comparison.low, '+')} to {_score(comparison.high, '+')}" if tested else ""
        cells += [
            _Cell(_score(comparison.difference, "+"), _finite(comparison.difference), interval),
            _Cell(_probability(comparison.adjusted), _finite(comparison.adjusted)),
            _Cell(_number(comparison.effect, "{:+.2f}"), _finite(comparison.effect)),
            _Cell(verdict, verdict, "" if _is_tested(line) else _count(comparison.pairs, "pair"), kind=verdict),
            _Cell(_number(comparison.seeds_needed, "{:,}"), _finite(comparison.seeds_needed)),
        ]
    costs = (
        (line.parameters or None, "{:,}"),
        (line.gflops or None, "{:.2f}"),
        (line.seconds_per_epoch, "{:.1f}"),
        (line.latency, "{:.2f}"),
    )
    return cells + [_Cell(_number(value, form), _finite(value)) for value, form in costs]


def _score(value: float | None, sign: str = "") -> str:
    return _number(value, f"{{:{sign}.3f}}")


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else _score(value)


def _number(value: float | None, form: str) -> str:
    return _NONE if _finite(value) is None else form.format(value).replace("-", "−")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _describe_runs(records: Sequence[Record], metric: str) -> dict[str, Any]:
    """Return what all runs share, where they differ, and a row for each run."""
    versions, other_versions = _split_common([record.versions for record in records if record.versions])
    arguments, differing = _split_common([record.arguments for record in records if record.arguments])
    own = [key for key in differing if key not in _NOT_SETTINGS]
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
            _Cell(_score(score), _finite(score)),
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
    """Return what all mappings hold alike, and the keys in which they differ."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    values = {key: {str(mapping.get(key, "")) for mapping in mappings} for key in keys}
    common = {key: next(iter(found)) for key, found in values.items() if len(found) == 1}
    return common, [key for key in values if key not in common]


# Charts. Colours are keys of the palettes: page.js puts those of the scheme in their place.


def _lay_out(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
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


def _title(text: str) -> dict[str, Any]:
    return {"text": _plain(text), "standoff": 8}


def _plain(text: str) -> str:
    """Return text in which Plotly finds neither tags of its own small HTML nor formulas for MathJax."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _wrap(text: str) -> str:
    """Return a name as an axis label that leaves a phone room for the chart."""
    parts = textwrap.wrap(text, 18, max_lines=2, placeholder="…", break_on_hyphens=False)
    return "<br>".join(map(_plain, parts))


def _hover(name: str, *rest: str) -> str:
    return "<br>".join([f"<b>{_plain(name)}</b>", *map(_plain, rest)])


def _error_bars(axis: str, points: Sequence[Summary | Comparison], colour: str) -> dict[str, Any]:
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


def _draw_differences(
    drawn: Sequence[Line], runs: Mapping[str, Sequence[Record]], looks: Mapping[str, _Look], metric: str
) -> _Figure:
    title = "Difference to the baseline"
    baselines = {line.setting: line.variant for line in drawn if line.is_baseline}
    traces: list[dict[str, Any]] = []
    labels: list[str] = []
    for line in drawn:
        comparison = line.comparison
        if comparison is None or not math.isfinite(comparison.difference):
            continue
        row, look = len(labels), looks[line.variant]
        labels.append(_wrap(line.variant))
        theirs = _score_seeds(runs[baselines.get(line.setting, "")], metric)
        ours = _score_seeds(runs[line.variant], metric)
        seeds = sorted(ours.keys() & theirs.keys())
        differences = [ours[seed] - theirs[seed] for seed in seeds]
        numbers = [_score(value, "+") for value in (comparison.difference, comparison.low, comparison.high)]
        interval = f" ({numbers[1]} to {numbers[2]})" if math.isfinite(comparison.low) else ""
        traces += [
            {
                "x": differences,
                "y": [row + 0.22] * len(seeds),
                "mode": "markers",
                "marker": {"color": look.colour, "size": 6, "opacity": 0.65, "symbol": "circle-open"},
                "hovertext": [
                    _hover(line.variant, f"seed {seed}: {_score(value, '+')}")
                    for seed, value in zip(seeds, differences, strict=True)
                ],
            },
            {
                "x": [comparison.difference],
                "y": [row - 0.08],
                "mode": "markers",
                "marker": {"color": look.colour, "size": 10, "symbol": look.symbol},
                **_error_bars("x", [comparison], look.colour),
                "hovertext": [_hover(line.variant, numbers[0] + interval, f"{_count(comparison.pairs, 'pair')}")],
            },
        ]
    if not labels:
        return _Figure(title, "No variant has a finished seed in common with a baseline, so there is none to show.")
    layout = _lay_out(
        {"title": _title(f"difference in {metric}"), "zeroline": True, "zerolinecolor": "ink", "rangemode": "tozero"},
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
    return _Figure(title, text, _finish(traces), layout, 72 + 46 * len(labels))


def _score_seeds(records: Iterable[Record], metric: str) -> dict[int, float]:
    scores: dict[int, float] = {}
    for record in sorted(records, key=lambda each: (each.name, str(each.folder))):  # the leaderboard counts the first
        if record.state == "done" and metric in record.scores:
            scores.setdefault(record.seed, record.scores[metric])
    return scores


def _finish(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "scatter", "hoverinfo": "text", **trace} for trace in traces]


def _draw_cost(
    drawn: Sequence[Line],
    looks: Mapping[str, _Look],
    metric: str,
    noun: str,
    axis: str,
    label: str,
    form: str,
    cost: Callable[[Line], float | None],
) -> _Figure:
    title = f"{metric} against {noun}"
    known = [(line, value) for line in drawn if (value := _finite(cost(line)))]
    if not known:
        return _Figure(title, f"Left out: no {noun} known for any finished variant.", print_width=_HALF)
    values = [value for _, value in known]
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), 0.04 * high)  # variants of nearly equal cost must not look far apart
    start, end = max(0.0, low - pad), high + pad
    traces = []
    for (line, value), place in zip(known, _stand_apart(values, (end - start) / 60), strict=True):
        summary, look = line.summary, looks[line.variant]
        interval = f" ({_score(summary.low)} to {_score(summary.high)})" if math.isfinite(summary.low) else ""
        traces.append(
            {
                "x": [place],
                "y": [summary.mean],
                "mode": "markers",
                "marker": {"color": look.colour, "size": 10, "symbol": look.symbol},
                **_error_bars("y", [summary], look.colour),
                "hovertext": [
                    _hover(
                        line.variant,
                        f"{metric} {_score(summary.mean)}{interval}",
                        f"{label} {form.format(value)}",
                        _count(summary.runs, "run"),
                    )
                ],
                "meta": line.variant,
            }
        )
    layout = _lay_out({"title": _title(axis), "range": [start, end], "nticks": 6}, {"title": _title(metric)})
    missing = [line.variant for line in drawn if line.variant not in {line.variant for line, _ in known}]
    text = "Mean over seeds, with its 95 % interval. Variants of equal cost stand side by side."
    text += f" Not known for {_enumerate(missing)}." if missing else ""
    return _Figure(title, text, _finish(traces), layout, 340, _HALF, tuple(line.variant for line, _ in known))


def _stand_apart(values: Sequence[float], step: float) -> list[float]:
    """Return places at least a step apart, near their values and in their order, so that no interval covers another.

    >>> _stand_apart([5.0, 1.0, 1.0, 9.0], 2.0)
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


def _draw_training(
    drawn: Sequence[Line], runs: Mapping[str, Sequence[Record]], looks: Mapping[str, _Look], metric: str
) -> list[_Figure]:
    figures = []
    histories = {
        line.variant: [_read_history(record.folder, metric) for record in runs[line.variant] if record.state == "done"]
        for line in drawn
    }
    for column, title in enumerate((f"{metric} on the validation images", "Training loss")):
        curves = {
            name: curve
            for name, found in histories.items()
            if (curve := _gather([{epoch: pair[column] for epoch, pair in run.items()} for run in found])).epochs
        }
        if not curves:
            figures.append(_Figure(title, "Left out: no finished run has it in its results.csv.", print_width=_HALF))
            continue
        traces = [trace for name, curve in curves.items() for trace in _trace_curve(name, curve, looks[name])]
        text = (
            "Mean over the finished seeds that reached the epoch; the band runs from the lowest seed to the highest."
            if column == 0
            else "Sum of all parts of the loss, drawn likewise. Its scale depends on the model and its settings."
        )
        layout = _lay_out({"title": _title("epoch")}, {"title": _title(metric if column == 0 else "loss")})
        figures.append(_Figure(title, text, _finish(traces), layout, 340, _HALF, tuple(curves)))
    return figures


def _read_history(folder: Path, metric: str) -> dict[int, tuple[float, float]]:
    """Return score and training loss of each epoch of a results.csv; rows cut short or damaged are left out."""
    history: dict[int, tuple[float, float]] = {}
    try:
        with (folder / "results.csv").open(encoding="utf-8", errors="replace", newline="") as file:
            header, *rows = list(csv.reader(file, skipinitialspace=True)) or [[]]
    except (OSError, csv.Error):
        return history
    names = [name.strip() for name in header]
    losses = [index for index, name in enumerate(names) if name.startswith("train/")]
    # Segmentation and pose write boxes first, and the masks or keypoints that are scored last.
    scores = [
        index
        for index, name in enumerate(names)
        if name.startswith("metrics/") and name[8:].split("(")[0].removeprefix("accuracy_") == metric
    ]
    for row in rows:
        try:
            values = dict(zip(names, map(float, row), strict=True))
            epoch = int(values["epoch"])
        except (ValueError, KeyError, OverflowError):
            continue
        cells = list(map(float, row))
        loss = sum(cells[index] for index in losses) if losses else math.nan
        history[epoch] = (cells[scores[-1]] if scores else math.nan, loss)
    return history


def _gather(runs: Sequence[Mapping[int, float]]) -> _Curve:
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for epoch, value in run.items():
            if math.isfinite(value):
                values[epoch].append(value)
    epochs = sorted(values)
    return _Curve(
        epochs,
        [_round(fmean(values[epoch])) for epoch in epochs],
        [_round(min(values[epoch])) for epoch in epochs],
        [_round(max(values[epoch])) for epoch in epochs],
        sum(bool(run) for run in runs),
    )


def _round(value: float) -> float:
    return float(f"{value:.5g}")  # more digits than a screen shows, a third of the bytes


def _trace_curve(name: str, curve: _Curve, look: _Look) -> list[dict[str, Any]]:
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
            "text": _hover(name),
            "hovertemplate": template + "<extra></extra>",
            "meta": name,
        }
    )
    return traces


def _draw_classes(drawn: Sequence[Line], runs: Mapping[str, Sequence[Record]], looks: Mapping[str, _Look]) -> _Figure:
    title = "Score of each class"
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in drawn:
        for record in runs[line.variant]:
            for name, value in record.classes.items() if record.state == "done" else ():
                if math.isfinite(value):
                    found[name][line.variant].append(value)
    if not found:
        return _Figure(title, "Left out: no finished run has recorded the scores of single classes.")
    variants = [line.variant for line in drawn if any(line.variant in scores for scores in found.values())]
    row_height = max(30, 7 * len(variants) + 10)
    means = {name: [fmean(values) for values in scores.values()] for name, scores in found.items()}
    widest = sorted(found, key=lambda name: min(means[name]) - max(means[name]))[: _CLASSES_HEIGHT // row_height]
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
                **_error_bars("x", summaries, look.colour),
                "hovertext": [
                    _hover(
                        variant,
                        f"{name}: {_score(summary.mean)}",
                        *[f"{_score(summary.low)} to {_score(summary.high)}"] * math.isfinite(summary.low),
                    )
                    for (_, name), summary in zip(rows, summaries, strict=True)
                ],
                "meta": variant,
            }
        )
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": {"color": "rule", "width": 1}}
    layout = _lay_out(
        {"title": _title("mAP50-95"), "side": "bottom"},
        {
            "tickvals": list(range(len(names))),
            "ticktext": [_wrap(name) for name in names],
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
        },
        shapes=[{**rule, "y0": row + 0.5, "y1": row + 0.5} for row in range(len(names) - 1)],
    )
    text = "mAP50-95 of the best checkpoint, mean over seeds with its 95 % interval."
    if len(names) < len(found):
        text += f" Of {len(found)} classes, the {len(names)} in which the variants differ most."
    return _Figure(title, text, _finish(traces), layout, 64 + len(names) * row_height, names=tuple(variants))


def _draw_shapes(drawn: Sequence[Line], runs: Mapping[str, Sequence[Record]]) -> list[_Figure]:
    figures = []
    for line in drawn:
        for record in runs[line.variant]:
            shapes = read_json(record.folder / SHAPES_FILE) if record.state == "done" else None
            traces = _trace_shapes(shapes) if isinstance(shapes, dict) else []
            if traces:
                text = f"{_count(sum('meta' not in trace for trace in traces), 'site')}, seed {record.seed}"
                layout = _lay_out(
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                    {"zeroline": True, "zerolinecolor": "rule", "nticks": 7},
                )
                figures.append(_Figure(line.variant, text, _finish(traces), layout, 250, _SMALL))
                break
    return figures


def _trace_shapes(shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    x = shapes.get("x") or []
    sites = [
        site
        for site in shapes.get("sites") or []
        if isinstance(site, dict) and all(len(site.get(key) or []) == len(x) > 1 for key in ("before", "after"))
    ]
    step = max(1, (len(x) - 1) // (_CURVE_POINTS - 1))
    x = _thin(x, step)
    traces: list[dict[str, Any]] = []
    for index, site in enumerate(sites):
        depth = round(7 * index / max(1, len(sites) - 1))
        hover = _hover(str(site.get("name", "")), str(site.get("activation", "")))
        traces.append(
            {"x": x, "y": _thin(site["after"], step), "line": {"color": f"d{depth}", "width": 1}, "hovertext": hover}
        )
    starts = dict.fromkeys(tuple(_thin(site["before"], step)) for site in sites)
    for start in starts:
        dashed = {"color": "ink", "width": 1.5, "dash": "dash"}
        traces.append({"x": x, "y": list(start), "line": dashed, "hovertext": "before training", "meta": "before"})
    return [{"mode": "lines", **trace} for trace in traces]


def _thin(values: Sequence[Any], step: int) -> list[float | None]:
    return [
        _round(value) if isinstance(value, (int, float)) and math.isfinite(value) else None for value in values[::step]
    ]


def _embed_json(data: Any) -> Markup:
    """Return JSON that may stand in a script element: no text in it can close that, and NaN becomes null."""
    text = json.dumps(_without_nan(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
