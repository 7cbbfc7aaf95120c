"""The leaderboard as a table in LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rtdetr_act.evaluation.statistics import LEVEL
from rtdetr_act.formatting import format_count, join_words
from rtdetr_act.integrations.ultralytics.models import STOCK
from rtdetr_act.study.latex import allow_breaks, escape_latex, wrap_latex
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.leaderboard_tables import describe_lost_runs, describe_missing_detections
from rtdetr_act.study.paper_text import (
    count_comparisons,
    describe_seeds,
    describe_splits,
    describe_training,
    group_rows,
    name_baselines,
)
from rtdetr_act.study.run_record import RunRecord

_UNKNOWN = "--"
_MANY = 9  # columns of numbers; more are set narrower
_NARROW = [
    "% In a text as narrow as that of the article class:",
    r"\ifdim\textwidth<400pt\scriptsize\setlength{\tabcolsep}{1.5pt}\fi",
]
_ARROWS = {"better": r"\uparrow", "worse": r"\downarrow"}
_FROM_COCO = ("mAP75", "mAP-S", "mAP-M", "mAP-L")


@dataclass(frozen=True)
class _Score:
    """How a score is called, and what it is.

    Attributes:
        title: Its title in running text, in LaTeX.
        group: Its title above a group of columns, or "".
        short: Its title below that.
        definition: What it is, as it follows those before.
    """

    title: str
    group: str
    short: str
    definition: str


_SCORES = {
    "mAP50-95": _Score(
        "mAP", "mAP", "50--95",
        "average precision, mean over classes and IoU thresholds from 0.50 to 0.95 in steps of 0.05",
    ),
    "mAP50": _Score("mAP$_{50}$", "mAP", "50", "the same at an IoU of 0.50"),
    "mAP75": _Score("mAP$_{75}$", "mAP", "75", "at an IoU of 0.75"),
    "mAP-S": _Score(r"mAP$_\mathrm{S}$", "mAP", "S", "of small objects (area below $32^2$ pixels)"),
    "mAP-M": _Score(r"mAP$_\mathrm{M}$", "mAP", "M", "of medium objects"),
    "mAP-L": _Score(r"mAP$_\mathrm{L}$", "mAP", "L", "of large objects (above $96^2$ pixels)"),
    "P": _Score("P", "", "P", "precision"),
    "R": _Score("R", "", "R", "recall, both at an IoU of 0.50 and at the confidence with the highest mean F1"),
    "top1": _Score("Top-1", "", "Top-1", "share of images whose class is the network's first answer"),
    "top5": _Score("Top-5", "", "Top-5", "share of those whose class is among its first five"),
}  # fmt: skip


@dataclass(frozen=True)
class _Column:
    """Column of numbers.

    Attributes:
        score: Name of the score; "" if it is none.
        top, bottom: Its title in two lines, in LaTeX; adjacent columns with equal tops share one.
        read: Function that returns the value of a variant, NaN or None if it is unknown.
        form: Function that returns a value as it is printed.
    """

    score: str
    top: str
    bottom: str
    read: Callable[[LeaderboardRow], float | None]
    form: Callable[[float], str]

    def format_cells(self, rows: Sequence[LeaderboardRow]) -> list[str]:
        """Return the cells of some rows, "" for unknown values, with the best scores among them in bold."""
        values = [self.read(row) for row in rows]
        cells = [self.form(value) if value is not None and math.isfinite(value) else "" for value in values]
        known = [cell for cell in cells if cell]
        if not self.score or len(known) < 2:  # nothing that it could be better than
            return cells
        best = max(known, key=float)
        return [rf"\textbf{{{cell}}}" if cell == best else cell for cell in cells]


@dataclass(frozen=True)
class _Printed:
    """Column as it is printed: its alignment, its title in two lines, and the cells of all rows.

    One without a title, None, continues the column before.
    """

    alignment: str
    top: str
    bottom: str | None
    cells: list[str]


def format_latex_table(
    rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], *, metric: str, latency_note: str = ""
) -> str:
    r"""Return the leaderboard as a `table*` in LaTeX, which needs the package booktabs.

    The variants of each setting stand together, the baseline first, then as in the leaderboard. Scores are in percent.
    Columns of which nothing is known are left out.

    Args:
        rows: The leaderboard.
        records: The runs.
        metric: Name of the ranked score, "mAP50-95" or "top1".
        latency_note: Sentence on how latency was measured.
    """
    blocks = group_rows(rows)
    columns = [column for column in _list_columns(rows, metric) if any(column.format_cells(rows))]
    printed = _lay_out(blocks, columns)
    lines = list(map(_join_cells, zip(*(column.cells for column in printed), strict=True)))
    body: list[str] = []
    for block in blocks:
        body += [r"\midrule", *lines[: len(block)]]
        del lines[: len(block)]
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs} in the preamble, and nothing else.",
            r"\begin{table*}[t]",
            r"\centering",
            *wrap_latex(rf"\caption{{{_write_caption(rows, records, columns)}}}"),
            r"\label{tab:activations}",
            r"\vspace{4pt}",
            r"\footnotesize\setlength{\tabcolsep}{3pt}",
            *(_NARROW if len(columns) > _MANY else []),
            rf"\begin{{tabular}}{{@{{}}{''.join(column.alignment for column in printed)}@{{}}}}",
            r"\toprule",
            *_format_header(printed),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\medskip",
            r"\begin{minipage}{\linewidth}\raggedright",
            *wrap_latex(" ".join(_write_notes(rows, columns, metric, latency_note))),
            r"\end{minipage}",
            r"\end{table*}",
            "",
        ]
    )


def _list_columns(rows: Sequence[LeaderboardRow], metric: str) -> list[_Column]:
    """Return the columns of numbers that a study may have, the ranked score first."""
    columns = [_make_score_column(metric, lambda row: {metric: row.summary.mean})]
    others = dict.fromkeys(name for row in rows for name in row.other_scores)
    columns += [_make_score_column(name, lambda row: row.other_scores) for name in others]
    if metric == "mAP50-95":
        columns += [_make_score_column(name, lambda row: row.coco_scores) for name in _FROM_COCO]
        columns += [_make_score_column(name, lambda row: {"P": row.precision, "R": row.recall}) for name in "PR"]
    return [
        *columns,
        _Column("", "Params", "(M)", lambda row: row.parameters / 1e6 or None, _format_millions),
        _Column("", "GFLOPs", "(640)", lambda row: row.gflops_640 or None, "{:.2f}".format),
        _Column("", "Latency", "(ms)", lambda row: row.latency_ms, "{:.2f}".format),
    ]


def _make_score_column(name: str, scores: Callable[[LeaderboardRow], Mapping[str, float]]) -> _Column:
    """Return the column of one of the scores of a variant."""
    score = _SCORES[name]
    return _Column(name, score.group, score.short, lambda row: scores(row).get(name), _format_percent)


def _lay_out(blocks: Sequence[Sequence[LeaderboardRow]], columns: Sequence[_Column]) -> list[_Printed]:
    """Return all columns as they are printed: names, seeds, and numbers, the first of them with its spread."""
    rows = [row for block in blocks for row in block]
    names, alignment = [escape_latex(row.variant) for row in rows], "l"
    most, width = (12, 0.13) if len(columns) > _MANY else (24, 0.25)
    if any(len(row.variant) > most for row in rows):
        names, alignment = [rf"\raggedright {allow_breaks(name)}" for name in names], rf"p{{{width}\textwidth}}"
    printed = [
        _Printed(alignment, "", "Activation", names),
        _Printed("c", "", "Seeds", [str(row.summary.runs) for row in rows]),
    ]
    for column in columns:
        cells = [cell or _UNKNOWN for block in blocks for cell in column.format_cells(block)]
        printed.append(_Printed("r", column.top, column.bottom, cells))
        if column is columns[0] and any(spreads := list(map(_format_spread, rows))):
            printed.append(_Printed("@{}l", column.top, None, spreads))
    return printed


def _format_header(printed: Sequence[_Printed]) -> list[str]:
    """Return the lines of the header: what columns share, with rules below, and the titles of each."""
    cells, rules, start = [], [], 1
    for top, group in groupby(column.top for column in printed):
        end = start + len(list(group))
        if top and end - start > 1:
            cells.append(rf"\multicolumn{{{end - start}}}{{c}}{{{top}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{end - 1}}}")
        else:
            cells += [top] * (end - start)
        start = end
    continued = [column.bottom is None for column in [*printed[1:], printed[0]]]
    titles = [
        rf"\multicolumn{{2}}{{c}}{{{column.bottom}}}" if spans else column.bottom
        for column, spans in zip(printed, continued, strict=True)
        if column.bottom is not None
    ]
    return [*([_join_cells(cells)] if any(cells) else []), *([" ".join(rules)] if rules else []), _join_cells(titles)]


def _join_cells(cells: Sequence[str]) -> str:
    """Return a row of the table."""
    return " & ".join(cells) + r" \\"


def _format_percent(value: float) -> str:
    """Return a fraction of 1 in percent."""
    return f"{100 * value:.1f}"


def _format_millions(value: float) -> str:
    """Return a number of millions with two decimals, or all of them if it is tiny."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.6f}".rstrip("0")


def _format_spread(row: LeaderboardRow) -> str:
    """Return what follows the mean of the ranked score: the standard deviation, and marks of what was shown."""
    deviation, marks = row.summary.deviation, _format_marks(row)
    spread = rf"{{}}\pm {_format_percent(deviation)}" if math.isfinite(deviation) else ""
    marked = f"^{{{marks}}}" if marks else ""
    return f"${spread}{marked}$" if spread or marked else ""


def _format_marks(row: LeaderboardRow) -> str:
    """Return the marks of the verdicts that a row has: an arrow for the direction, then the tests that show it."""
    verdicts = {
        r"\dagger": row.comparison.verdict if row.comparison else "",
        r"\ddagger": row.over_seeds_and_images.verdict if row.over_seeds_and_images else "",
    }
    marks = ""
    for verdict, arrow in _ARROWS.items():
        tests = [mark for mark, each in verdicts.items() if each == verdict]
        marks += arrow * bool(tests) + "".join(tests)
    return marks


def _write_caption(rows: Sequence[LeaderboardRow], records: Sequence[RunRecord], columns: Sequence[_Column]) -> str:
    """Return what was trained, and what the scores are."""
    scores = [_SCORES[column.score] for column in columns if column.score]
    spread = any(row.summary.runs > 1 for row in rows)
    best = "column" if len({row.setting for row in rows}) == 1 else "column in each block"
    sentences = [f"Activations{describe_training(records)}."]
    if scores:
        sentences += [
            f"Scores on the validation images in percent: means over {describe_seeds(records)}"
            + (rf", $\pm$ the standard deviation for {scores[0].title}" if spread else "")
            + f". The best of each {best} is bold.",
            "; ".join(f"{score.title}: {score.definition}" for score in scores) + ".",
        ]
    return " ".join(sentences)


def _write_notes(
    rows: Sequence[LeaderboardRow], columns: Sequence[_Column], metric: str, latency_note: str
) -> list[str]:
    """Return sentences below the table: where the numbers are from, and what the marks mean."""
    own = [_SCORES[column.score].title for column in columns if column.score and column.score not in _FROM_COCO]
    coco = [_SCORES[column.score].title for column in columns if column.score in _FROM_COCO]
    known = [column.top for column in columns]
    notes = []
    if metric == "mAP50-95" and own:
        notes.append(f"{join_words(own)}: by Ultralytics' validation of the best checkpoint of each run.")
    if coco:
        notes.append(f"{join_words(coco)}: as COCO computes them, from the detections of the same checkpoints.")
    notes += [escape_latex(describe_missing_detections(rows)), *_describe_marks(rows)]
    if any(row.activation == STOCK for row in rows):
        notes.append("stock: the model with its own activations.")
    if "GFLOPs" in known:
        notes.append(r"GFLOPs: of one image of $640 \times 640$ pixels, activations included.")
    if "Latency" in known:
        notes.append(escape_latex(latency_note))
    notes.append(escape_latex(describe_lost_runs(rows)))
    return [note for note in notes if note]


def _describe_marks(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return sentences on the marks of the table, or on their absence."""
    tests = _describe_tests(rows)
    if not tests:
        return ["No difference was tested: that takes two seeds of a variant and of its baseline."]
    baseline = f"the baseline ({name_baselines(rows)})"
    level = f"$p < {LEVEL:g}$ after Holm's correction"
    marks = "".join(map(_format_marks, rows))
    if not marks:
        return [f"No difference to {baseline} is shown with {level} by {' or by '.join(tests.values())}."]
    arrows = [f"${arrow}$ {verdict}" for verdict, arrow in _ARROWS.items() if arrow in marks]
    named = [f"${mark}$ by {test}" for mark, test in tests.items()]
    return [
        f"{', '.join(arrows)} than {baseline}, {level}: {'; '.join(named)}.",
        "Without a mark, no difference was shown, or none was tested.",
    ]


def _describe_tests(rows: Sequence[LeaderboardRow]) -> dict[str, str]:
    """Return the tests of the study by their marks, each with its number of comparisons."""
    paired, both = count_comparisons(rows)
    tests = {}
    if paired:
        tests[r"\dagger"] = (
            f"a paired $t$-test over seeds{describe_splits(rows)} ({format_count(paired, 'comparison')})"
        )
    if both:
        tests[r"\ddagger"] = (
            f"a paired bootstrap over images with the variance between seeds, of COCO's mAP "
            f"({format_count(both, 'comparison')})"
        )
    return tests
