"""What Ultralytics, torch and the system raise because of what a user gave, as a sentence; bugs stay what they are."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ultralytics.cfg import TASKS
from ultralytics.engine.predictor import BasePredictor
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import SETTINGS

from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, TrainingError, quote, raising_module, reason

# Ultralytics' modules that check what a user gave. What is raised elsewhere is no user's mistake.
_CHECKING = (
    "ultralytics.cfg", "ultralytics.data", "ultralytics.engine", "ultralytics.utils.checks", "ultralytics.utils.export",
    "ultralytics.utils.torch_utils",
)  # fmt: skip
_REFUSALS = (
    ValueError,
    TypeError,
    NotImplementedError,
    AssertionError,
    SyntaxError,
    FileNotFoundError,
    ConnectionError,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def explain(error: BaseException) -> RtdetrActError | None:
    """Return the sentence for what Ultralytics or torch raised because of what a user gave, None for a bug.

    A bug is whatever was not raised on purpose, in words, by code that checks what a user gave.
    """
    if isinstance(error, RtdetrActError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    words = reason(error)
    if is_full(error):
        place = f" {quote(str(error.filename))}" if isinstance(error, OSError) and error.filename else ""
        return InputError(f"cannot write{place}: {getattr(error, 'strerror', None) or words}")
    if isinstance(error, RuntimeError):
        if any(words_of in str(error) for words_of in _MEMORY):
            return TrainingError("memory ran out: try a smaller batch or imgsz")
        if "NaN" in str(error):
            return TrainingError(f"{words}; try a smaller lr0, or amp=False")
        if str(error).startswith("Dataset"):
            return InputError(words)
    if isinstance(error, _REFUSALS) and raising_module(error).startswith(_CHECKING) and _is_deliberate(error):
        return InputError(words)
    return None


def _is_deliberate(error: BaseException) -> bool:
    """Say whether code checked something and refused it in words, rather than ran into something unforeseen."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return line.lstrip().startswith(("raise ", "assert ")) and bool(str(error).strip())


def is_full(error: BaseException) -> bool:
    """Say whether an error is of a disk that is full or cannot be written."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # torch's own writer knows no errno.
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream error")
    )


def find_holder(error: BaseException) -> Any:
    """Return the trainer, validator or predictor that was at work when an error was raised, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        holder = frame.f_locals.get("self")
        if isinstance(holder, (BaseTrainer, BaseValidator, BasePredictor)) and getattr(holder, "save_dir", None):
            return holder
    return None


def find_roots(arguments: Mapping[str, Any]) -> frozenset[Path]:
    """Return the folders that there are already where a run with these arguments of Ultralytics puts its results.

    Args:
        arguments: `project` and `name` count. Some releases take a relative project from where they are called, others
            from below `runs_dir` of Ultralytics' settings and the task.
    """
    named = Path(str(arguments.get("project") or ""), str(arguments.get("name") or ""))
    with suppress(OSError, ValueError):  # of a name that no folder can have, which Ultralytics will say
        places = [path.resolve() for path in (named, *(Path(SETTINGS["runs_dir"], task, named) for task in TASKS))]
        above = (next((folder for folder in place.parents if folder.is_dir()), place) for place in places)
        return frozenset([*above, *(place for place in places if place.is_dir())])
    return frozenset()


def remove_empty(folder: Path, roots: Collection[Path]) -> None:
    """Remove a folder for results in which there are none, and those above it that were made for it.

    Args:
        folder: Where a run would have put its results.
        roots: What `find_roots` found before the run; neither these nor anything outside of them is removed.
    """
    folder = folder.resolve()
    if folder in roots or not any(root in folder.parents for root in roots):
        return
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
    for path in (folder, *folder.parents):
        if path in roots:
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


@contextmanager
def one_sentence(**arguments: Any) -> Iterator[None]:
    """Turn what Ultralytics raises on wrong arguments and data into errors of one sentence; bugs stay tracebacks.

    A folder that was made for results and got none is removed.

    Args:
        **arguments: Those that Ultralytics is called with; `project` and `name` say where results go.

    Raises:
        InputError: For a device, format or data set that Ultralytics cannot use, and for a full disk.
        TrainingError: For a loss that stayed NaN, and where memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    roots = find_roots(arguments)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        if holder := find_holder(error):
            remove_empty(Path(holder.save_dir), roots)
        if explained is error:
            raise
        raise explained from error
