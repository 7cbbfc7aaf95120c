"""What a study ends with, at any time again: latencies, the leaderboard and the page."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdetr_act.errors import FoldError, InputError, RtdetrActError
from rtdetr_act.study.folder import LATENCY_FILE, SEARCH_FILE, STUDY_FILE, read_json, write_json
from rtdetr_act.study.leaderboard import Line, build, headline
from rtdetr_act.study.records import Record, read_records

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
    """Write the leaderboard and the page from what the run folders hold.

    Args:
        folder: Of a study, or one with runs that Ultralytics made without us.
        baseline: The activation that others are compared with; None for the study's own, else "stock".
        measure: Measure the latency of variants that have none yet.

    Raises:
        InputError: There is no run, no such baseline, the folder is a search, or it cannot be written.
    """
    from rtdetr_act.study.leaderboard import write
    from rtdetr_act.study.page import write_page

    if (folder / SEARCH_FILE).exists():
        raise InputError(
            f"'{folder}' is a search, whose rungs do not compare: give '{folder / 'final'}', or a rung of it"
        )
    records = read_records(folder)
    known = {record.activation for record in records}
    if baseline is not None and baseline not in known:
        raise InputError(f"the baseline '{baseline}' is none of the activations: {', '.join(sorted(known))}")
    baseline = baseline or (read_json(folder / STUDY_FILE) or {}).get("baseline") or "stock"
    latencies, note = _latencies(folder, records, measure)
    metric = headline(records)
    lines = build(records, baseline=baseline, latencies=latencies)
    try:
        files = write(lines, folder, metric)
        title = folder.resolve().name
        files.append(write_page(lines, records, folder / "report.html", title=title, metric=metric, latency_note=note))
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror or error}") from None
    return Report(lines, metric, files)


def _latencies(folder: Path, records: Sequence[Record], measure: bool) -> tuple[dict[str, float], str]:
    """Return the latency of each variant in ms, and how it was measured."""
    first = {record.variant: record for record in reversed(records) if record.state == "done"}
    found = read_json(folder / LATENCY_FILE) or {"milliseconds": {}, "note": ""}
    if measure and set(first) - set(found["milliseconds"]):
        # All of them once more, in turns: what was measured at another time cannot be compared.
        with contextlib.suppress(RtdetrActError):  # a task that cannot be measured keeps its scores
            found = {"milliseconds": _measure(first), "note": _describe_measurement()}
            write_json(folder / LATENCY_FILE, found)
    return found["milliseconds"], found["note"]


def _measure(first: Mapping[str, Record]) -> dict[str, float]:
    import torch

    from rtdetr_act.bench import make_inference, take_turns
    from rtdetr_act.deploy.fold import fold_activations
    from rtdetr_act.runs import load_model

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
    import torch

    return f"Latency: one image at a time, folded, by PyTorch {torch.__version__} on one CPU core, all in turns."
