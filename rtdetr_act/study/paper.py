"""Files of a study for a paper: a table and sentences in LaTeX, figures, and every number of every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import polars.selectors as cs

from rtdetr_act.evaluation.bootstrap import HEADLINES
from rtdetr_act.evaluation.detection_files import RunScores
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.paper_figures import encode_figures
from rtdetr_act.study.paper_table import format_latex_table
from rtdetr_act.study.paper_text import write_methods
from rtdetr_act.study.run_record import RunRecord


def encode_paper(
    rows: Sequence[LeaderboardRow],
    records: Sequence[RunRecord],
    scores: Mapping[Path, RunScores],
    *,
    metric: str,
    latency_note: str = "",
) -> dict[str, bytes]:
    """Return the contents of the files for a paper, by file name. Figures that have nothing to show are left out.

    Args:
        rows: The leaderboard.
        records: The runs.
        scores: Scores on resamples of the validation images, by run folder; runs may be missing.
        metric: Name of the ranked score, "mAP50-95" or "top1".
        latency_note: Sentence on how latency was measured.
    """
    return {
        "table.tex": format_latex_table(rows, records, metric=metric, latency_note=latency_note).encode("ascii"),
        "methods.tex": write_methods(rows, records, scores, metric=metric).encode("ascii"),
        "runs.csv": make_run_frame(records, scores).write_csv().encode(),
        **encode_figures(rows, records, metric),
    }


def make_run_frame(records: Sequence[RunRecord], scores: Mapping[Path, RunScores]) -> pl.DataFrame:
    """Return every number of every run, a row each, with null for unknown values.

    Titles of COCO's scores start with "COCO", of those of single classes with "AP", of Ultralytics' arguments with
    "argument", and of versions with "version". Scores are fractions of 1.

    Args:
        records: The runs.
        scores: COCO's scores by run folder; runs may be missing.
    """
    lines = [_list_run_cells(record, scores.get(record.folder)) for record in records]
    # Columns stand in the order of their sections, also where the first run lacks one that another run has.
    columns = dict.fromkeys(key for sections in zip(*lines, strict=True) for cells in sections for key in cells)
    cells = [{key: value for section in line for key, value in section.items()} for line in lines]
    frame = pl.DataFrame({name: pl.Series(name, [line.get(name) for line in cells]) for name in columns})
    return frame.with_columns(cs.float().fill_nan(None))


def _list_run_cells(record: RunRecord, scores: RunScores | None) -> list[dict[str, object]]:
    """Return the cells of a run by column, in sections."""
    coco: dict[str, float] = {}
    if scores:
        names = [*HEADLINES, *(f"AP {name}" for name in scores.categories)]
        coco = dict(zip(names, map(float, scores.scores.observed), strict=True))
    return [
        {
            "run": record.name,
            "variant": record.variant,
            "activation": record.activation,
            "setting": record.setting or None,
            "seed": record.seed,
            "state": record.state,
            "reason": record.reason or None,
            "epochs": record.epochs,
        },
        {name: float(value) for name, value in record.scores.items()},
        {"precision": record.precision, "recall": record.recall},
        {f"averaged {name}": float(value) for name, value in record.averaged_scores.items()},
        {"averaged_epochs": record.averaged_epochs or None, "validation_share": record.validation_share},
        {f"COCO {name}": value for name, value in coco.items()},
        {f"AP {name}": float(value) for name, value in record.classes.items()},
        {
            "sites": record.sites,
            "parameters": record.parameters or None,
            "gflops_640": record.gflops_640 or None,
            "seconds_per_epoch": record.seconds_per_epoch,
        },
        {f"argument {name}": None if value is None else str(value) for name, value in record.arguments.items()},
        {f"version {name}": value for name, value in record.versions.items()},
    ]
