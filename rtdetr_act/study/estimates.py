"""Estimated duration of a study or a search on this machine, without starting a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.study.grid import RunConfig, Study, check_runs, expand_study
from rtdetr_act.study.local import Slot, find_slots
from rtdetr_act.study.preparation import STARTUP_SECONDS, check_study, estimate_seconds
from rtdetr_act.study.search import Search, check_search_folder, make_rung_study, select_candidates


@dataclass(frozen=True)
class StudyEstimate:
    """Runs of a study, and how long they take on this machine.

    Attributes:
        runs: The runs, in the order in which they start.
        seconds: Estimated duration of each run by its name, alone on its slot; 0 for a finished run.
        slots: Number of runs at once.
    """

    runs: Sequence[RunConfig]
    seconds: Mapping[str, float]
    slots: int

    @property
    def total(self) -> float:
        """Estimated duration of the study in seconds."""
        unfinished = sum(map(bool, self.seconds.values()))
        return sum(self.seconds.values()) / min(self.slots, max(1, unfinished))


@dataclass(frozen=True)
class SearchEstimate:
    """How long the rungs of a search take on this machine.

    Attributes:
        seconds: Estimated duration of each rung by its name, from the pace of uniform plans.
        slots: Number of runs at once.
    """

    seconds: Mapping[str, float]
    slots: int

    @property
    def total(self) -> float:
        """Estimated duration of the search in seconds."""
        return sum(self.seconds.values())


def estimate_study(study: Study, folder: Path, *, cpus: int | None = None) -> StudyEstimate:
    """Return the runs of a study with their estimated duration; downloads and writes nothing.

    Args:
        study: The study.
        folder: Its folder, which need not exist.
        cpus: CPU cores of each run; None for 1.

    Raises:
        RtdetrActError: A run is not possible, or the folder holds another study.
    """
    slots = find_slots(study.arguments.get("device"), cpus)
    with no_downloads():
        runs, _ = check_study(study, folder, read_only=True)
        return StudyEstimate(runs, _estimate_seconds(runs, folder, slots[0]), len(slots))


def estimate_search(search: Search, folder: Path, *, cpus: int | None = None) -> SearchEstimate:
    """Return the estimated duration of the rungs of a search; downloads and writes nothing.

    Args:
        search: The search.
        folder: Its folder, which need not exist.
        cpus: CPU cores of each run; None for 1.

    Raises:
        RtdetrActError: A run is not possible, or the folder holds another search.
    """
    slots = find_slots(search.arguments.get("device"), cpus)
    with no_downloads():
        check_search_folder(search, folder)
        first = search.rungs[0]
        candidates = select_candidates(search, 0, [])
        check_runs(expand_study(make_rung_study(search, first, candidates)), read_only=True)
        uniform = [each for each in candidates if each.origin == "uniform"]
        runs = expand_study(make_rung_study(search, first, uniform))
        seconds = _estimate_seconds(runs, folder / "none", slots[0])
    pace = (sum(seconds.values()) / len(seconds) - STARTUP_SECONDS) / first.epochs
    rungs = {}
    for rung in search.rungs:
        count = rung.plans * len(rung.seeds)
        rungs[rung.name] = count * (STARTUP_SECONDS + pace * rung.epochs) / min(len(slots), count)
    return SearchEstimate(rungs, len(slots))


def _estimate_seconds(runs: Sequence[RunConfig], folder: Path, slot: Slot) -> dict[str, float]:
    """Return the estimated duration of each run in seconds, by name, on a slot."""
    device = slot.device.split(",")[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(slot.threads or threads)
    try:
        return estimate_seconds(runs, folder, device=f"cuda:{device}" if device.isdigit() else device)
    finally:
        torch.set_num_threads(threads)
