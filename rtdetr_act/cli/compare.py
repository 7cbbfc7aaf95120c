"""Command that compares detectors with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_act.cli.grammar import command, parse_pairs
from rtdetr_act.cli.options import Data, Models, OutputFile, Pairs, check_csv, require
from rtdetr_act.cli.printing import print_warning

if TYPE_CHECKING:
    from rtdetr_act.evaluation.differences import ScoreDifference
    from rtdetr_act.evaluation.statistics import Conclusion
    from rtdetr_act.workflows.compare import DetectorComparison

_DIFFERENT = ("better", "worse")
_MAX_CATEGORIES = 20  # of a table; of more, those with a difference are printed


@command(
    "stock/best.pt arelu/best.pt data=my.yaml",
    "'stock-s*.json' 'arelu-s*.json' instances_val.json",
)
def compare(
    pairs: Pairs = None,
    model: Models = None,
    data: Data = None,
    resamples: Annotated[int, typer.Option("--resamples", help="Of the images; 1000.")] = 1000,
    output: OutputFile = None,
) -> None:
    """Compare detectors: average precision with intervals and p-values.

    A word is a method, the first one the baseline: a checkpoint, or detections of any framework in COCO's JSON, with
    the ground truth last. Several files of a method, as a folder, a pattern or a,b, are runs with other seeds. -o
    writes every figure as CSV.
    """
    from rtdetr_act.workflows.compare import compare_detectors

    words = list(model or [])
    example = "rtdetr-act compare a.pt b.pt data=my.yaml"
    require("".join(words), "compare needs two checkpoints, or two files of detections and a ground truth", example)
    if data is None and len(words) > 2 and words[-1].lower().endswith(".json"):
        data = words.pop()
    arguments = parse_pairs(pairs, reserved=("task", "mode", "resume", "save_json", "project", "name", "plots"))
    check_csv(output)
    found = compare_detectors(
        words, data, arguments, resamples=resamples, warn=print_warning, show=lambda line: print(line, flush=True)
    )
    _print_comparison(found)
    if output is not None:
        found.to_csv(output)
        print(f"file: {output}")


def _print_comparison(found: DetectorComparison) -> None:
    """Print the scores of each method, and a table of differences for each question."""
    from rtdetr_act.evaluation.differences import PRIMARY
    from rtdetr_act.formatting import format_count, format_number

    print(
        f"{format_count(found.images, 'image')}, {format_count(found.boxes, 'labelled object')}, "
        f"{format_count(found.resamples, 'resample')} of the images; average precision as COCO defines it"
    )
    for method in found.methods:
        runs = format_count(len(method.files), "run")
        spread = f" ± {format_number(method.deviation, '{:.4f}')}" if len(method.files) > 1 else ""
        print(f"{method.name}: {PRIMARY} {format_number(method.scores[PRIMARY], '{:.4f}')}{spread}, {runs}")
    _print_table(
        "On other images of this kind, would these checkpoints differ?",
        [(row, row.over_images) for row in found.rows],
    )
    several = [(row, row.over_seeds_and_images) for row in found.rows if row.over_seeds_and_images]
    if several:
        _print_table("Trained with other seeds, on other images, would these methods differ?", several)
    if any(len(method.files) == 1 for method in found.methods):
        print("one run says nothing of other seeds: give several files of each method to test the methods themselves")


def _print_table(question: str, rows: Sequence[tuple[ScoreDifference, Conclusion]]) -> None:
    """Print the differences that answer a question; of many categories, those that differ.

    Args:
        question: The question.
        rows: The differences, and what may be concluded of each.
    """
    from rich.markup import escape
    from rich.table import Table

    from rtdetr_act.evaluation.differences import PRIMARY
    from rtdetr_act.formatting import format_number, format_p
    from rtdetr_act.tables import print_wide_table

    categories = [conclusion for row, conclusion in rows if row.is_category]
    is_long = len(categories) > _MAX_CATEGORIES
    table = Table(title=question, title_justify="left")
    for column in ("method", "score"):
        table.add_column(column, overflow="fold")
    for column in ("baseline", "value", "difference", "interval", "p (Holm)"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for row, conclusion in rows:
        if row.is_category and is_long and conclusion.verdict not in _DIFFERENT:
            continue
        scores = [format_number(each, "{:.4f}") for each in (row.baseline_score, row.variant_score)]
        low, high = (format_number(each, "{:+.4f}") for each in (conclusion.low, conclusion.high))
        table.add_row(
            *map(escape, (row.variant, f"{PRIMARY} of {row.score}" if row.is_category else row.score)),
            *scores,
            format_number(row.difference, "{:+.4f}"),
            *(("", "") if isnan(conclusion.p) else (f"{low} to {high}", format_p(conclusion.p_holm))),
            conclusion.verdict,
        )
    print_wide_table(table)
    if is_long:
        equal = sum(each.verdict not in _DIFFERENT for each in categories)
        print(f"no difference is shown in {equal} of {len(categories)} categories, which -o lists")
