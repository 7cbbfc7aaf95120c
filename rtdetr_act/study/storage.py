"""Files in the folder of a study: names, schemas, reading and writing, locks."""

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
# In the folder of a search, beside the studies that are its rungs.
SEARCH_FILE = "search.json"  # settings of the search, which cannot change
CANDIDATES_FILE = "picks.json"  # in the folder of a rung: its plans and their origins
# In a run folder, beside Ultralytics' own files.
RUN_FILE = "run.json"  # configuration of the run; written before the run starts
RESULT_FILE = "result.json"  # outcome of the run; written last, so that its presence marks a finished run
CURVES_FILE = "activations.json"  # curves of learned activations before and after training
DETECTIONS_FILE = "detections.npz"  # what the best checkpoint finds on the validation images, and their labels
SCORES_FILE = "scores.npz"  # its scores on resamples of the validation images
SNAPSHOT_FILE = "snapshot.pt"  # state after the last epoch; removed once there is a result
ATTEMPTS_FILE = "attempts.json"  # processes that ended without a result, with reasons
_LOCK_FILE = ".lock"
WORKER_EXIT_SECONDS = 30.0  # within which the processes of a killed study end
REPORT_FILES = ("leaderboard.csv", "leaderboard.parquet", "leaderboard.md", "report.html")  # written by a report
PAPER_FOLDER = "paper"  # beside them, for a paper
PAPER_FILES = ("table.tex", "methods.tex", "runs.csv", "differences.pdf", "cost.pdf", "training.pdf")

_MAX_NAME_BYTES = 255  # bytes, on all usual file systems

T = TypeVar("T")
ScoreName = Literal["mAP50", "mAP50-95", "top1", "top5"]

# What the user can do about a damaged file.
_REMEDIES = {
    STUDY_FILE: "delete it; the study writes it again",
    LATENCY_FILE: "delete it; the study measures again",
    SEARCH_FILE: "restore a copy, or give another folder with output=",
    CANDIDATES_FILE: "restore a copy, or delete the folders of this rung and of all later rungs",
    RUN_FILE: "delete the run folder; the study repeats the run",
    RESULT_FILE: "delete it; the study repeats the run",
    CURVES_FILE: "delete it; the report leaves the curves out",
    ATTEMPTS_FILE: "delete it; it only counts attempts",
}


@dataclass(frozen=True)
class StudySettings:
    """Contents of `study.json`: the activation that others are compared with."""

    baseline: str


@dataclass(frozen=True)
class Latencies:
    """Contents of `latency.json`: milliseconds per image by variant, and a sentence on the measurement."""

    milliseconds: Mapping[str, NonNegativeFloat] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Attempt:
    """Item of `attempts.json`: when a process ended without a result, in ISO 8601, and why."""

    ended: str
    reason: str


@dataclass(frozen=True)
class RunResult:
    """Contents of `result.json`; the fields are those of `RunRecord`."""

    state: Literal["done", "failed", "stopped"]
    reason: str = ""
    scores: Mapping[ScoreName, UnitFloat] = field(default_factory=dict)
    classes: Mapping[str, UnitFloat] = field(default_factory=dict)
    precision: UnitFloat | None = None
    recall: UnitFloat | None = None
    averaged_scores: Mapping[ScoreName, UnitFloat] = field(default_factory=dict)
    validation_share: NonNegativeFloat | None = None
    epochs: NonNegativeInt = 0
    sites: NonNegativeInt = 0
    parameters: NonNegativeInt = 0
    gflops_640: NonNegativeFloat = 0.0
    seconds_per_epoch: NonNegativeFloat | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    # Earlier versions counted at the training size. That is read and not shown, since it does not compare.
    gflops: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        """Reject a finished run without a score to rank it by."""
        if self.state == "done" and not {"mAP50-95", "top1"} & set(self.scores):
            raise ValueError("scores has neither mAP50-95 nor top1")


@dataclass(frozen=True)
class SiteCurves:
    """Outputs of one activation before and after training; None for values that are not finite."""

    name: str
    activation: str
    before: Sequence[float | None]
    after: Sequence[float | None]


@dataclass(frozen=True)
class ActivationCurves:
    """Contents of `activations.json`: input values, and the outputs of each activation at them."""

    x: Sequence[float]
    sites: Sequence[SiteCurves] = ()

    def __post_init__(self) -> None:
        """Reject curves of another length than x."""
        if len(self.x) < 2 or any(len(curve) != len(self.x) for s in self.sites for curve in (s.before, s.after)):
            raise ValueError("the curves have not as many points as x")


def encode_json(data: Any, *, indent: int | None = 1) -> bytes:
    """Return plain data encoded as a JSON file, in UTF-8.

    Args:
        data: Plain data without NaN or infinity.
        indent: Spaces per level; None for a single line.
    """
    return (json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write plain data as a JSON file, atomically.

    Args:
        path: File to write; its folder must exist.
        data: Plain data without NaN or infinity.
        indent: Spaces per level; None for a single line.

    Raises:
        OSError: The disk is full or the file is not writable.
    """
    write_atomically(path, encode_json(data, indent=indent))


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return the validated contents of a JSON file of a study, or None if the file does not exist.

    Args:
        path: The file; its name is one of the constants of this module.
        kind: Type of the contents: a dataclass, or a list of one.

    Raises:
        InputError: The file is not readable or damaged; the message says what to do.
    """
    try:
        # NaN, which an earlier version wrote for values of a curve that are not finite, becomes None.
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
        return decode(kind, data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        reason = f"invalid JSON in line {error.lineno}"
    except (ValueError, RecursionError, SpecError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    raise make_damaged_error(path, reason)


def make_damaged_error(path: Path, reason: str) -> InputError:
    """Return an error that names a damaged file, what is wrong with it, and what to do about it.

    Args:
        path: The file; its name is one of the constants of this module.
        reason: What is wrong.
    """
    return InputError(f"'{path}' is damaged, or of another version: {reason}; {_REMEDIES[path.name]}")


def folder_exists(folder: Path) -> bool:
    """Return whether a path is an existing folder.

    Raises:
        InputError: The file system cannot tell, for example for a name that is too long.
    """
    try:
        return folder.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {quote(str(folder))}: {error.strerror or error}") from None


def check_writable_files(folder: Path, names: Sequence[str]) -> None:
    """Check that files can be written to a folder, which need not exist.

    Args:
        folder: The folder.
        names: Names of the files.

    Raises:
        InputError: The folder is a file or not writable, or one of the names belongs to something else than a file.
    """
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in folder.parts):
        raise InputError(f"cannot write to {quote(str(folder))}: a name in it is longer than {_MAX_NAME_BYTES} bytes")
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not existing.is_dir():
            raise InputError(f"'{existing}' is a file, so that nothing can be written to {quote(str(folder))}")
        if not os.access(existing, os.W_OK):
            raise InputError(f"cannot write to '{existing}': Permission denied")
        for path in (folder / name for name in names):
            if path.exists() and not path.is_file():
                raise InputError(f"'{path}' is not a file, and would have to be replaced by one: move it away")
    except OSError as error:  # a name that is too long
        raise InputError(f"cannot write to {quote(str(folder))}: {error.strerror or error}") from None


@contextmanager
def lock_folder(folder: Path, *, timeout: float = 0.0) -> Iterator[None]:
    """Lock a folder for the body of a `with` statement, creating it if missing; a context manager.

    The system releases the lock when the process ends, however it ends. If the body fails without having written
    anything, a folder that was created is removed.

    Args:
        folder: Folder of a study, or of a run.
        timeout: Seconds to wait for another process to release the lock. Default: 0.

    Raises:
        InputError: Another process holds the lock, or the folder is not writable.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(create_folder(folder))
            path = folder / _LOCK_FILE
            is_new = not path.exists()
            lock = FileLock(path)
            lock.acquire(timeout=timeout)
            while not path.exists():  # removed by a failed process while this one opened it
                lock.release()
                lock.acquire(timeout=timeout)
        except Timeout:
            raise InputError(
                f"another process is working in '{folder}': wait until it has ended, or give another folder with "
                "output="
            ) from None
        except OSError as error:
            raise InputError(f"cannot write to {quote(str(folder))}: {error.strerror or error}") from None
        try:
            yield
        except GeneratorExit:  # the process ends while it holds the lock, which is not a failure
            raise
        except BaseException:
            if is_new:
                with suppress(OSError):  # Windows removes it on release
                    path.unlink()
            raise
        finally:
            lock.release()
