"""What a study ends with, at any time again: latencies, the leaderboard and the page."""

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
from rtdetr_act.files import write_files_atomically
from rtdetr_act.integrations.ultralytics.costs import make_inference
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard, choose_metric, encode_leaderboard
from rtdetr_act.study.naming import shorten, to_single_line
from rtdetr_act.study.page import render_page
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.storage import (
    LATENCY_FILE,
    REPORT_FILES,
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

_ROUNDS = 7  # measurements of each variant's latency, in turns


@dataclass(frozen=True)
class Report:
    """What a study came to.

    Attributes:
        lines: The leaderboard.
        metric: The score that it ranks by.
        files: What was written.
    """

    lines: list[LeaderboardRow]
    metric: str
    files: list[Path]


def write_report(folder: Path, *, baseline: str | None = None, measure: bool = False) -> Report:
    """Write the leaderboard and the page from what the run folders hold, all files or none.

    Args:
        folder: Of a study, or one with runs that Ultralytics made without us.
        baseline: The activation that others are compared with; None for the study's own, else "stock".
        measure: Measure the latency of variants that have none yet.

    Raises:
        InputError: There is no run, no such baseline, the folder is a search, a record in it is damaged, or it cannot
            be written.
    """
    if folder_exists(folder) and (folder / SEARCH_FILE).exists():
        raise InputError(
            f"'{folder}' is a search, whose rungs do not compare: give '{folder / 'final'}', or a rung of it"
        )
    records = read_runs(folder)
    check_writable_files(folder, REPORT_FILES)
    known = {record.activation for record in records}
    if baseline is not None and baseline not in known:
        raise InputError(
            f"the baseline {quote(baseline)} is none of the activations: {', '.join(map(shorten, sorted(known)[:10]))}"
        )
    recorded = read_json(folder / STUDY_FILE, StudySettings)
    baseline = baseline or (recorded.baseline if recorded else "stock")
    metric = choose_metric(records)
    try:
        latencies = _get_latencies(folder, records, measure)
        lines = build_leaderboard(records, baseline=baseline, latencies=latencies.milliseconds)
        title = to_single_line(folder.resolve().name)
        page = render_page(lines, records, title=title, metric=metric, latency_note=latencies.note)
        contents = dict(zip(REPORT_FILES, [*encode_leaderboard(lines, metric).values(), page.encode()], strict=True))
        write_files_atomically({folder / name: content for name, content in contents.items()})
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; the files there are as they were, and "
            "rtdetr-act report makes them once that is put right"
        ) from None
    return Report(lines, metric, [folder / name for name in contents])


def _get_latencies(folder: Path, records: Sequence[RunRecord], measure: bool) -> Latencies:
    """Return the latency of each variant in ms, and how it was measured."""
    first = {record.variant: record for record in reversed(records) if record.state == "done"}
    found = read_json(folder / LATENCY_FILE, Latencies) or Latencies()
    if measure and set(first) - set(found.milliseconds):
        # All of them once more, in turns: what was measured at another time cannot be compared.
        with contextlib.suppress(RtdetrActError):  # a task that cannot be measured keeps its scores
            found = Latencies(_measure_latencies(first), _describe_measurement())
            write_json(folder / LATENCY_FILE, asdict(found))
    return found


def _measure_latencies(first: Mapping[str, RunRecord]) -> dict[str, float]:
    # One thread: several wait for one another, and where something else runs, 5 ms become 460.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes: dict[int, dict[str, Callable[[], Any]]] = {}
        for variant, record in first.items():
            model = load_model(str(record.folder / "weights" / "best.pt"))
            with contextlib.suppress(FoldError):
                fold_activations(model)
            imgsz = int(record.arguments.get("imgsz", 640))
            image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
            sizes.setdefault(imgsz, {})[variant] = make_inference(model.model, image)
        turns = [time_medians(calls, _ROUNDS, repeat=4) for calls in sizes.values()]
    finally:
        torch.set_num_threads(before)
    return {variant: statistics.median(times) * 1e3 for found in turns for variant, times in found.items()}


def _describe_measurement() -> str:
    return f"Latency: one image at a time, folded, by PyTorch {torch.__version__} on one CPU core, all in turns."
