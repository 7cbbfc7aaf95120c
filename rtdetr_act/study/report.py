"""Report of a study: latencies, the leaderboard, the HTML page, and files for a paper."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import FoldError, InputError, RtdetrActError, quote
from rtdetr_act.evaluation.detection_files import read_scores
from rtdetr_act.files import create_folder, write_files_atomically
from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.costs import make_inference
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.results import Table, TableResult
from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard, choose_metric
from rtdetr_act.study.leaderboard_tables import encode_leaderboard, make_leaderboard_frame
from rtdetr_act.study.naming import shorten, to_single_line
from rtdetr_act.study.page import render_page
from rtdetr_act.study.paper import encode_paper
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.storage import (
    LATENCY_FILE,
    PAPER_FILES,
    PAPER_FOLDER,
    REPORT_FILES,
    SCORES_FILE,
    SEARCH_FILE,
    STUDY_FILE,
    Latencies,
    StudySettings,
    check_writable_files,
    folder_exists,
    read_json,
    write_json,
)
from rtdetr_act.timing import time_medians

_ROUNDS = 7  # of interleaved measurements of the variants


@dataclass(frozen=True, repr=False)
class StudyReport(TableResult):
    """Report of a study.

    Attributes:
        rows: The leaderboard.
        metric: Name of the score that it ranks by.
        files: The files written.
    """

    rows: list[LeaderboardRow]
    metric: str
    files: list[Path]

    def _summarise(self) -> str:
        """Return the numbers of variants and finished runs."""
        runs = sum(row.summary.runs for row in self.rows)
        return f"{format_count(len(self.rows), 'variant')}, {format_count(runs, 'finished run')}"

    def _make_table(self) -> Table:
        """Return the leaderboard, with the columns of leaderboard.csv and numbers in full precision."""
        frame = make_leaderboard_frame(self.rows, self.metric)
        return frame.columns, frame.iter_rows()


def report_study(
    folder: Path | str, *, baseline: str | None = None, measure: bool = False, latex: bool = False
) -> StudyReport:
    """Write the leaderboard and the HTML page from the run folders, all files or none, and return the report.

    Args:
        folder: Folder of a study, or one with runs of Ultralytics.
        baseline: Activation that others are compared with; None for that of the study, or "stock" outside of a study.
        measure: Measure latencies if a finished variant has none.
        latex: Write the files for a paper, too, to the folder "paper" in it: a table and sentences in LaTeX, figures as
            PDF, and a CSV file with every number of every run. Default: False.

    Raises:
        InputError: There is no run or no such baseline, the folder is that of a search, a file in it is damaged, or it
            is not writable.
    """
    folder = Path(folder)
    if folder_exists(folder) and (folder / SEARCH_FILE).exists():
        raise InputError(
            f"'{folder}' is a search, whose rungs do not compare: give '{folder / 'final'}', or a rung of it"
        )
    records = read_runs(folder)
    check_writable_files(folder, REPORT_FILES)
    if latex:
        check_writable_files(folder / PAPER_FOLDER, PAPER_FILES)
    activations = {record.activation for record in records}
    if baseline is not None and baseline not in activations:
        raise InputError(
            f"the baseline {quote(baseline)} is not one of the activations: "
            + ", ".join(map(shorten, sorted(activations)[:10]))
        )
    recorded = read_json(folder / STUDY_FILE, StudySettings)
    baseline = baseline or (recorded.baseline if recorded else "stock")
    metric = choose_metric(records)
    try:
        latencies = _get_latencies(folder, records, measure)
        scores = {record.folder: read_scores(record.folder / SCORES_FILE) for record in records}
        known = {path: each for path, each in scores.items() if each}
        rows = build_leaderboard(records, baseline=baseline, latencies=latencies.milliseconds, scores=known)
        title = to_single_line(folder.resolve().name)
        page = render_page(rows, records, title=title, metric=metric, latency_note=latencies.note)
        leaderboard = encode_leaderboard(rows, metric).values()
        contents = dict(zip(REPORT_FILES, [*leaderboard, page.encode()], strict=True))
        if latex:
            paper = encode_paper(rows, records, known, metric=metric, latency_note=latencies.note)
            contents |= {f"{PAPER_FOLDER}/{name}": content for name, content in paper.items()}
        with create_folder(folder / PAPER_FOLDER) if latex else contextlib.nullcontext():
            write_files_atomically({folder / name: content for name, content in contents.items()})
        if latex:  # a figure of an earlier report that has nothing to show now
            for name in {f"{PAPER_FOLDER}/{each}" for each in PAPER_FILES} - contents.keys():
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; its files are unchanged, and "
            "rtdetr-act report writes them once that is resolved"
        ) from None
    return StudyReport(rows, metric, [folder / name for name in contents])


def _get_latencies(folder: Path, records: Sequence[RunRecord], measure: bool) -> Latencies:
    """Return the recorded latencies, after measuring them again if one is missing and `measure` is true."""
    first = {record.variant: record for record in reversed(records) if record.state == "done"}
    latencies = read_json(folder / LATENCY_FILE, Latencies) or Latencies()
    if measure and set(first) - set(latencies.milliseconds):
        # All of them, interleaved: measurements at different times do not compare.
        with contextlib.suppress(RtdetrActError):  # a task without this measurement still has its scores
            latencies = Latencies(_measure_latencies(first), _describe_measurement())
            write_json(folder / LATENCY_FILE, asdict(latencies))
    return latencies


def _measure_latencies(runs: Mapping[str, RunRecord]) -> dict[str, float]:
    """Return the median latency of one image on the CPU in milliseconds, by variant.

    Args:
        runs: A finished run of each variant.
    """
    # One thread: several wait for one another, and on a busy machine 5 ms become 460.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls_by_size: dict[int, dict[str, Callable[[], Any]]] = {}
        for variant, record in runs.items():
            model = load_model(str(record.folder / "weights" / "best.pt"))
            with contextlib.suppress(FoldError):
                fold_activations(model)
            imgsz = int(record.arguments.get("imgsz", 640))
            image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
            calls_by_size.setdefault(imgsz, {})[variant] = make_inference(model.model, image)
        measured = [time_medians(calls, _ROUNDS, repeat=4) for calls in calls_by_size.values()]
    finally:
        torch.set_num_threads(threads)
    return {
        variant: statistics.median(times) * 1e3
        for times_by_variant in measured
        for variant, times in times_by_variant.items()
    }


def _describe_measurement() -> str:
    """Return the sentence of the report on how latency is measured."""
    return f"Latency: one image at a time, folded, by PyTorch {torch.__version__} on one CPU core, all in turns."
