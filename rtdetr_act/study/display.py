"""Progress display of a study: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rtdetr_act.errors import escape
from rtdetr_act.integrations.ultralytics.results import format_scores
from rtdetr_act.study.grid import count_epochs, read_run_config
from rtdetr_act.study.process import read_attempts, read_progress
from rtdetr_act.study.run_folders import read_run
from rtdetr_act.study.run_record import RunRecord

_UPDATE_SECONDS = {True: 1.0, False: 60.0}  # between updates, in a terminal and elsewhere


class Display:
    """Shows the progress of a study; a context manager that an engine calls with the folders of the running runs.

    Args:
        folders: All run folders of the study.
        console: Console to print to; None for the standard output.
    """

    def __init__(self, folders: Sequence[Path], console: Console | None = None) -> None:
        self.folders = list(folders)
        self.console = console or Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.epochs = {folder: _read_planned_epochs(folder) for folder in folders}
        self.running: set[Path] = set()
        self.finished: dict[Path, RunRecord] = {}
        self.updated = -math.inf
        for folder in folders:
            self._record_end(folder)
        self.finished_before = set(self.finished)

    def __enter__(self) -> Display:
        """Start the display, with a line on the runs that were finished before."""
        if self.finished_before:
            self.console.print(f"{len(self.finished_before)} of {len(self.folders)} runs are finished already")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the display, and leave the last state on the screen."""
        if self.live:
            self.live.update(self._make_table([]), refresh=True)
            self.live.stop()

    def __call__(self, running: Sequence[Path]) -> None:
        """Report runs that started or ended, and update the display at intervals.

        Args:
            running: Folders of the running runs.
        """
        now = set(running)
        for folder in [folder for folder in running if folder not in self.running]:
            self._print_line(f"{folder.name}: started")
        for folder in self.running - now:
            self._record_end(folder)
            self._print_end(folder)
        self.running = now
        if time.monotonic() - self.updated < _UPDATE_SECONDS[self.live is not None]:
            return
        self.updated = time.monotonic()
        if self.live:
            self.live.update(self._make_table(running), refresh=True)
        elif running:
            self._print_line(self._format_summary(running))

    def _record_end(self, folder: Path) -> None:
        """Add a run to the finished ones if it has a result."""
        record = read_run(folder)
        if record.state in ("done", "stopped") or record.versions:
            self.finished[folder] = record

    def _print_line(self, line: str) -> None:
        """Print a line, unless there is a live table."""
        if not self.live:
            self.console.print(escape(line), highlight=False, soft_wrap=True, markup=False)

    def _print_end(self, folder: Path) -> None:
        """Print how a run ended."""
        record = self.finished.get(folder)
        if record and record.state == "done":
            self._print_line(f"{folder.name}: done, {_format_scores(record)}")
        elif record:
            self._print_line(f"{folder.name}: {record.state}, {record.reason}")
        else:
            attempts = read_attempts(folder)
            self._print_line(f"{folder.name}: failed, {attempts[-1].reason if attempts else 'its process ended'}")

    def _format_summary(self, running: Sequence[Path]) -> str:
        """Return the progress of the study in one line."""
        left = self._estimate_seconds_left(running)
        states = [record.state for record in self.finished.values()]
        parts = [f"{states.count('done')} of {len(self.folders)} runs done", f"{len(running)} running"]
        parts += [f"{states.count(state)} {state}" for state in ("failed", "stopped") if state in states]
        parts += [f"about {format_seconds(left)} left"] if not math.isnan(left) else []
        return ", ".join(parts)

    def _make_table(self, running: Sequence[Path]) -> Table:
        """Return a table of the running runs and the last finished ones."""
        table = Table(title=self._format_summary(running), title_justify="left", title_style="bold")
        table.add_column("run", overflow="fold")
        for title in ("epoch", "score so far", "time left"):
            table.add_column(title, justify="right")
        for folder in sorted(running):
            progress = read_progress(folder)
            planned = self.epochs[folder]
            pace = progress.seconds / progress.epochs if progress.epochs else math.nan
            table.add_row(
                folder.name,
                f"{progress.epochs} of {planned}",
                "" if progress.score is None else f"{progress.score:.4f}",
                "" if math.isnan(pace) else format_seconds(pace * (planned - progress.epochs)),
            )
        for folder, record in list(self.finished.items())[-5:]:
            if folder not in self.finished_before:
                table.add_row(folder.name, record.state, _format_scores(record), "", style="dim")
        return table

    def _estimate_seconds_left(self, running: Sequence[Path]) -> float:
        """Return the estimated seconds to the end of the study, by the pace of the median run; NaN before any epoch."""
        progress = {folder: read_progress(folder) for folder in running}
        paces = [step.seconds / step.epochs for step in progress.values() if step.epochs]
        paces += [r.seconds_per_epoch for r in self.finished.values() if not math.isnan(r.seconds_per_epoch)]
        if not paces:
            return math.nan
        epochs = sum(self.epochs[folder] for folder in self.folders if folder not in self.finished)
        return statistics.median(paces) * (epochs - sum(p.epochs for p in progress.values())) / max(1, len(running))


def _read_planned_epochs(folder: Path) -> int:
    """Return the number of epochs that a run takes."""
    config = read_run_config(folder)
    return count_epochs(config) if config else 0


def _format_scores(record: RunRecord) -> str:
    """Return the scores of a run in one line."""
    return "  ".join(format_scores(record.scores))


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours.

    >>> format_seconds(59), format_seconds(600), format_seconds(3900)
    ('59 s', '10 min', '1 h 5 min')
    """
    if seconds < 100:
        return f"{max(0, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 and minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
