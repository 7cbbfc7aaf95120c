"""The folder of a study: what lies where, who may write, and files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout

from rtdetr_act.errors import InputError, SpecError, quote
from rtdetr_act.files import create_folder, write_atomically
from rtdetr_act.study.decode import NonNegativeFloat, NonNegativeInt, UnitFloat, decode

RUNS_FOLDER = "runs"
STUDY_FILE = "study.json"
LATENCY_FILE = "latency.json"
# What the folder of a search holds beside the studies that are its rungs.
SEARCH_FILE = "search.json"  # its settings; other ones are refused
CANDIDATES_FILE = "picks.json"  # in the folder of a rung: its plans, and where each came from
# What a run folder holds beside Ultralytics' own files.
RUN_FILE = "run.json"  # which row of which study it is; written before the run starts
RESULT_FILE = "result.json"  # what came out; written last, so that a folder with one is finished
CURVES_FILE = "activations.json"  # learned activations as curves, before and after
SNAPSHOT_FILE = "snapshot.pt"  # the state after the last epoch, until there is a result
ATTEMPTS_FILE = "attempts.json"  # processes that ended without a result, and why
_LOCK_FILE = ".lock"
REPORT_FILES = ("leaderboard.csv", "leaderboard.parquet", "leaderboard.md", "report.html")  # what a report writes

_MAX_NAME_BYTES = 255  # bytes, on all usual file systems

T = TypeVar("T")
ScoreName = Literal["mAP50", "mAP50-95", "top1", "top5"]

# What to do about a damaged file.
_REMEDIES = {
    STUDY_FILE: "delete it; the study writes it anew",
    LATENCY_FILE: "delete it; the study measures anew",
    SEARCH_FILE: "put back a copy, or give another folder with --output",
    CANDIDATES_FILE: "put back a copy, or delete the folder of this rung and those of the rungs after it",
    RUN_FILE: "delete the folder it is in; the study does that run again",
    RESULT_FILE: "delete it; the study does that run again",
    CURVES_FILE: "delete it; the report leaves its curves out",
    ATTEMPTS_FILE: "delete it; it only counts tries",
}


@dataclass(frozen=True)
class StudySettings:
    """What `study.json` holds."""

    baseline: str


@dataclass(frozen=True)
class Latencies:
    """What `latency.json` holds: ms by variant, and how they were measured."""

    milliseconds: Mapping[str, NonNegativeFloat] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Attempt:
    """One of `attempts.json`: when a process ended without a result, and why."""

    ended: str
    reason: str


@dataclass(frozen=True)
class RunResult:
    """What `result.json` holds; the meanings are those of `Record`."""

    state: Literal["done", "failed", "stopped"]
    reason: str = ""
    scores: Mapping[ScoreName, UnitFloat] = field(default_factory=dict)
    classes: Mapping[str, UnitFloat] = field(default_factory=dict)
    epochs: NonNegativeInt = 0
    sites: NonNegativeInt = 0
    parameters: NonNegativeInt = 0
    gflops: NonNegativeFloat = 0.0
    seconds_per_epoch: NonNegativeFloat | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse a finished run that could not be ranked, and would go missing."""
        if self.state == "done" and not {"mAP50-95", "top1"} & set(self.scores):
            raise ValueError("scores has neither mAP50-95 nor top1")


@dataclass(frozen=True)
class SiteCurves:
    """The curve of one activation before and after training; None where it is not finite."""

    name: str
    activation: str
    before: Sequence[float | None]
    after: Sequence[float | None]


@dataclass(frozen=True)
class ActivationCurves:
    """What `activations.json` holds."""

    x: Sequence[float]
    sites: Sequence[SiteCurves] = ()

    def __post_init__(self) -> None:
        """Refuse curves that do not fit their axis."""
        if len(self.x) < 2 or any(len(curve) != len(self.x) for s in self.sites for curve in (s.before, s.after)):
            raise ValueError("the curves have not as many points as x")


def encode_json(data: Any, *, indent: int | None = 1) -> bytes:
    """Return plain data as the text of a JSON file."""
    return (json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write plain data as JSON, whole or not at all; raises OSError."""
    write_atomically(path, encode_json(data, indent=indent))


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return what a JSON file of a study holds, checked, or None where there is none.

    Args:
        path: The file; its name is one of those above.
        kind: What it must hold: a dataclass, or a sequence of one.

    Raises:
        InputError: It cannot be read, or it is damaged; the sentence says how to go on.
    """
    try:
        # NaN, which an earlier version wrote where a curve left all bounds, is no number either.
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
        return decode(kind, data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        reason = f"no JSON in line {error.lineno}"
    except (ValueError, RecursionError, SpecError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    raise make_damaged_error(path, reason)


def make_damaged_error(path: Path, reason: str) -> InputError:
    """Return the error that says what is wrong with a record, and what to do about it."""
    return InputError(f"'{path}' is damaged, or of another version: {reason}; {_REMEDIES[path.name]}")


def folder_exists(folder: Path) -> bool:
    """Say whether there is such a folder; raises InputError where that cannot be told, as of a name too long."""
    try:
        return folder.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {quote(str(folder))}: {error.strerror or error}") from None


def check_writable_files(folder: Path, names: Sequence[str]) -> None:
    """Check that a folder can take some files, as far as can be told before; it need not exist.

    Raises:
        InputError: The folder is a file, or may not be written, or in the place of a file is something else.
    """
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in folder.parts):
        raise InputError(f"cannot write to {quote(str(folder))}: a name in it is longer than {_MAX_NAME_BYTES} bytes")
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not there.is_dir():
            raise InputError(f"'{there}' is a file, so that nothing can be written to {quote(str(folder))}")
        if not os.access(there, os.W_OK):
            raise InputError(f"cannot write to '{there}': Permission denied")
        for path in (folder / name for name in names):
            if path.exists() and not path.is_file():
                raise InputError(f"'{path}' is not a file, and would have to be replaced by one: move it away")
    except OSError as error:  # a name that is too long
        raise InputError(f"cannot write to {quote(str(folder))}: {error.strerror or error}") from None


@contextmanager
def lock_folder(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    If the body fails and has written nothing, the folder is as it was, or away again.

    Args:
        folder: A study, or one run in it.
        wait: Seconds to wait for another process to let go.

    Raises:
        InputError: Another process holds it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(create_folder(folder))
            path = folder / _LOCK_FILE
            is_new = not path.exists()
            lock = FileLock(path)
            lock.acquire(timeout=wait)
            while not path.exists():  # its holder failed and removed it while this process opened it
                lock.release()
                lock.acquire(timeout=wait)
        except Timeout:
            raise InputError(
                f"another process works in '{folder}': wait until it has ended, or give another folder with --output"
            ) from None
        except OSError as error:
            raise InputError(f"cannot write to {quote(str(folder))}: {error.strerror or error}") from None
        try:
            yield
        except GeneratorExit:  # of a process that ends while it holds the folder, which is no failure
            raise
        except BaseException:
            if is_new:
                with suppress(OSError):  # Windows does so on release, and not before
                    path.unlink()
            raise
        finally:
            lock.release()
