"""Processes of runs: start, progress, end, and reasons of failure."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from rtdetr_act.integrations.ultralytics.results import read_results
from rtdetr_act.study.storage import ATTEMPTS_FILE, RESULT_FILE, Attempt, RunResult, read_json, write_json

LOG_FILE = "log.txt"
_MEMORY_ERRORS = (
    "out of memory",
    "MemoryError",
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",
)


def start_run(
    folder: Path, *, device: str = "", threads: int = 0, pauses: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start the worker process of a run, and return it.

    The worker ends by itself when this process ends. Its output is appended to `log.txt`.

    Args:
        folder: The run folder, with a `run.json`.
        device: Ultralytics' `device`; "" for that of the run's configuration.
        threads: Number of torch threads on a CPU; 0 for Ultralytics' default.
        pauses: Numbers of epochs after which the run waits for `release_run`; a multi-GPU run never waits.
    """
    command = [sys.executable, "-m", "rtdetr_act.study.worker", str(folder)]
    command += ["--device", device] if device else []
    command += ["--threads", str(threads)] if threads else []
    command += ["--pauses", *map(str, pauses)] if pauses else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (folder / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            bufsize=0,  # of that pipe
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # A process group of its own: Ctrl-C reaches the study only, which then ends its runs.
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def release_run(process: subprocess.Popen[bytes], epochs: int) -> None:
    """Allow a run to train beyond a number of epochs, after which it pauses or will pause.

    Args:
        process: Process of the run.
        epochs: Number of epochs, one of `pauses`.
    """
    if process.stdin:
        with contextlib.suppress(OSError):  # the process has ended
            process.stdin.write(b"%d\n" % epochs)


def kill_run(process: subprocess.Popen[bytes]) -> None:
    """Kill the process of a run and its data loader processes; the state after the last epoch remains on the disk."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


def read_result(folder: Path) -> RunResult | None:
    """Return the result of a run, or None if it has none; raises InputError if the file is damaged."""
    return read_json(folder / RESULT_FILE, RunResult)


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts at a run that ended without a result; raises InputError if the file is damaged."""
    return read_json(folder / ATTEMPTS_FILE, list[Attempt]) or []


def is_finished(folder: Path) -> bool:
    """Return whether a run has a result, a final failure included; raises InputError if the file is damaged."""
    return read_result(folder) is not None


def explain_exit(folder: Path, code: int) -> str:
    """Return the reason why a process ended without a result, from its exit code and its log.

    Args:
        folder: The run folder.
        code: Exit code of the process; negative for a signal.
    """
    tail = _read_last_lines(folder / LOG_FILE)
    memory = next((line for line in reversed(tail) if any(words in line for words in _MEMORY_ERRORS)), None)
    if memory is not None:
        return f"out of memory: {memory}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    last = tail[-1] if tail else "it printed nothing"
    return f"exit code {code}: {last}"


def _read_last_lines(log: Path, size: int = 8000) -> list[str]:
    """Return the lines in the last bytes of a file that are not blank; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            _seek_near_end(file, size)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _seek_near_end(file: IO[bytes], size: int) -> None:
    """Move to a number of bytes before the end of a file, or to its start."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))


def record_attempt(folder: Path, reason: str) -> None:
    """Add an attempt that ended now without a result to the `attempts.json` of a run.

    Args:
        folder: The run folder.
        reason: Why there is no result.
    """
    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    attempts = [*read_attempts(folder), Attempt(ended, reason)]
    write_json(folder / ATTEMPTS_FILE, [asdict(attempt) for attempt in attempts])


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        epochs: Number of finished epochs.
        seconds: Time that they took.
        score: Score of the last epoch, mAP50-95 or top1; None if there is none.
    """

    epochs: int
    seconds: float
    score: float | None


def read_progress(folder: Path) -> Progress:
    """Return the progress of a run from its results.csv; a line that is being written does not count."""
    epochs = read_results(folder).epochs
    if not epochs:
        return Progress(0, 0.0, None)
    last = epochs[-1]
    seconds = last.seconds if math.isfinite(last.seconds) else 0.0
    return Progress(last.number, seconds, last.score)
