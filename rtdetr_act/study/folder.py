"""The folder of a study: what lies where, who may write, and files that are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rtdetr_act.errors import InputError
from rtdetr_act.files import write_atomically

RUNS = "runs"
STUDY_FILE = "study.json"
LATENCY_FILE = "latency.json"
# What the folder of a search holds beside the studies that are its rungs.
SEARCH_FILE = "search.json"  # its settings; other ones are refused
PICKS_FILE = "picks.json"  # in the folder of a rung: its plans, and where each came from
# What a run folder holds beside Ultralytics' own files.
ROW_FILE = "run.json"  # which row of which study it is; written before the run starts
RESULT_FILE = "result.json"  # what came out; written last, so that a folder with one is finished
SHAPES_FILE = "activations.json"  # learned activations as curves, before and after
SNAPSHOT_FILE = "snapshot.pt"  # the state after the last epoch, until there is a result
ATTEMPTS_FILE = "attempts.json"  # processes that ended without a result, and why


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write plain data as JSON, whole or not at all; raises OSError."""
    write_atomically(path, (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    Args:
        folder: A study, or one run in it.
        wait: Seconds to wait for another process to let go.

    Raises:
        InputError: Another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=wait)
    except Timeout:
        raise InputError(
            f"another process works in '{folder}': wait until it has ended, or give another folder with --output"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
