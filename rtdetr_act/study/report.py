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
from rtdetr_act.files import write_together
from rtdetr_act.integrations.ultralytics.costs import make_inference
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.study.folder import (
    LATENCY_FILE,
    OUTPUTS,
    SEARCH_FILE,
    STUDY_FILE,
    Latencies,
    StudyRecord,
    check_outputs,
    is_folder,
    read_record,
    write_json,
)
from rtdetr_act.study.leaderboard import Line, build, compose, headline
from rtdetr_act.study.naming import cut, show
from rtdetr_act.study.page import compose_page
from rtdetr_act.study.record import Record
from rtdetr_act.study.records import read_records
from rtdetr_act.timing import take_turns

_TURNS = 7  # measurements of each variant's latency, in turns


@dataclass(frozen=True)
class Report:
    """What a study came to.

    Attributes:
        lines: The leaderboard.
        metric: The score that it ranks by.
        files: What was written.
    """

    lines: list[Line]
    metric: str
    files: list[Path]


def conclude(folder: Path, *, baseline: str | None = None, measure: bool = False) -> Report:
    """Write the leaderboard and the page from what the run folders hold, all files or none.

    Args:
        folder: Of a study, or one with runs that Ultralytics made without us.
        baseline: The activation that others are compared with; None for the study's own, else "stock".
        measure: Measure the latency of variants that have none yet.

    Raises:
        InputError: There is no run, no such baseline, the folder is a search, a record in it is damaged, or it cannot
            be written.
    """
    if is_folder(folder) and (folder / SEARCH_FILE).exists():
        raise InputError(
            f"'{folder}' is a search, whose rungs do not compare: give '{folder / 'final'}', or a rung of it"
        )
    records = read_records(folder)
    check_outputs(folder, OUTPUTS)
    known = {record.activation for record in records}
    if baseline is not None and baseline not in known:
        raise InputError(
            f"the baseline {quote(baseline)} is none of the activations: {', '.join(map(cut, sorted(known)[:10]))}"
        )
    recorded = read_record(folder / STUDY_FILE, StudyRecord)
    baseline = baseline or (recorded.baseline if recorded else "stock")
    metric = headline(records)
    try:
        latencies = _latencies(folder, records, measure)
        lines = build(records, baseline=baseline, latencies=latencies.milliseconds)
        title = show(folder.resolve().name)
        page = compose_page(lines, records, title=title, metric=metric, latency_note=latencies.note)
        contents = dict(zip(OUTPUTS, [*compose(lines, metric).values(), page.encode()], strict=True))
        write_together({folder / name: content for name, content in contents.items()})
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; the files there are as they were, and "
            "rtdetr-act report makes them once that is put right"
        ) from None
    return Report(lines, metric, [folder / name for name in contents])


def _latencies(folder: Path, records: Sequence[Record], measure: bool) -> Latencies:
    """Return the latency of each variant in ms, and how it was measured."""
    first = {record.variant: record for record in reversed(records) if record.state == "done"}
    found = read_record(folder / LATENCY_FILE, Latencies) or Latencies()
    if measure and set(first) - set(found.milliseconds):
        # All of them once more, in turns: what was measured at another time cannot be compared.
        with contextlib.suppress(RtdetrActError):  # a task that cannot be measured keeps its scores
            found = Latencies(_measure(first), _describe_measurement())
            write_json(folder / LATENCY_FILE, asdict(found))
    return found


def _measure(first: Mapping[str, Record]) -> dict[str, float]:
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
        turns = [take_turns(calls, _TURNS, repeat=4) for calls in sizes.values()]
    finally:
        torch.set_num_threads(before)
    return {variant: statistics.median(times) * 1e3 for found in turns for variant, times in found.items()}


def _describe_measurement() -> str:
    return f"Latency: one image at a time, folded, by PyTorch {torch.__version__} on one CPU core, all in turns."
