"""Start the process of a run, see how far it is, and say why it ended."""

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
    """Start the run of a folder, which ends by itself when this process does; what it prints goes to `log.txt`.

    Args:
        folder: The run folder, with `run.json` in it.
        device: Ultralytics' `device`; "" for that of the row.
        threads: Threads of torch on a CPU; 0 for Ultralytics' own choice.
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
            # A group of its own: Ctrl-C is for the study, which ends its runs in order.
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def release_run(process: subprocess.Popen[bytes], epochs: int) -> None:
    """Let a run that pauses after that number of epochs, or will, train on to its next pause."""
    if process.stdin:
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(b"%d\n" % epochs)


def kill_run(process: subprocess.Popen[bytes]) -> None:
    """End a run at once, loader processes included; its folder keeps what the last epoch left."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


def read_result(folder: Path) -> RunResult | None:
    """Return what came out of a run, or None while nothing has; raises InputError where the file is damaged."""
    return read_json(folder / RESULT_FILE, RunResult)


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the processes of a run that ended without a result; raises InputError where the file is damaged."""
    return read_json(folder / ATTEMPTS_FILE, list[Attempt]) or []


def is_finished(folder: Path) -> bool:
    """Say whether a run has its result, a final failure included; raises InputError where that is damaged."""
    return read_result(folder) is not None


def explain_exit(folder: Path, code: int) -> str:
    """Return in a sentence why a process ended without a result.

    Args:
        folder: The run folder, with its log.
        code: The exit code; negative for a signal.
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
    try:
        with log.open("rb") as file:
            _seek_near_end(file, size)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _seek_near_end(file: IO[bytes], size: int) -> None:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))


def record_attempt(folder: Path, reason: str) -> None:
    """Record that a process of the run ended without a result, and why."""
    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    attempts = [*read_attempts(folder), Attempt(ended, reason)]
    write_json(folder / ATTEMPTS_FILE, [asdict(attempt) for attempt in attempts])


@dataclass(frozen=True)
class Progress:
    """How far a run is: epochs done, seconds that they took, and the headline score of the last, or None."""

    epochs: int
    seconds: float
    score: float | None


def read_progress(folder: Path) -> Progress:
    """Return how far a run is, from its results.csv; a line that is being written does not count."""
    epochs = read_results(folder).epochs
    if not epochs:
        return Progress(0, 0.0, None)
    last = epochs[-1]
    seconds = last.seconds if math.isfinite(last.seconds) else 0.0
    return Progress(last.number, seconds, last.score)
