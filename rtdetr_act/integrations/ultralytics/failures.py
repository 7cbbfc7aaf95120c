"""Translate exceptions that Ultralytics, torch and the system raise on user input into errors of one sentence.

Bugs keep their tracebacks.
"""

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

# Modules of Ultralytics that validate user input. An exception from another module is a bug.
_VALIDATING_MODULES = (
    "ultralytics.cfg", "ultralytics.data", "ultralytics.engine", "ultralytics.utils.checks", "ultralytics.utils.export",
    "ultralytics.utils.torch_utils",
)  # fmt: skip
_VALIDATION_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    AssertionError,
    SyntaxError,
    FileNotFoundError,
    ConnectionError,
)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def translate(error: BaseException) -> RtdetrActError | None:
    """Return the error of one sentence for an exception that user input caused; None for a bug.

    Any exception is a bug that is not raised explicitly, with a message, by code that validates user input.

    Args:
        error: Exception of Ultralytics, torch or the system; an `RtdetrActError` is returned as it is.
    """
    if isinstance(error, RtdetrActError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    message = reason(error)
    if is_write_error(error):
        place = f" {quote(str(error.filename))}" if isinstance(error, OSError) and error.filename else ""
        return InputError(f"cannot write{place}: {getattr(error, 'strerror', None) or message}")
    if isinstance(error, RuntimeError):
        if any(phrase in str(error) for phrase in _OUT_OF_MEMORY):
            return TrainingError("memory ran out: try a smaller batch or imgsz")
        if "NaN" in str(error):
            return TrainingError(f"{message}; try a smaller lr0, or amp=False")
        if str(error).startswith("Dataset"):
            return InputError(message)
    validating = raising_module(error).startswith(_VALIDATING_MODULES)
    if validating and isinstance(error, _VALIDATION_ERRORS) and _is_raised_explicitly(error):
        return InputError(message)
    return None


def _is_raised_explicitly(error: BaseException) -> bool:
    """Return whether an exception comes from a `raise` or `assert` statement and has a message."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return line.lstrip().startswith(("raise ", "assert ")) and bool(str(error).strip())


def is_write_error(error: BaseException) -> bool:
    """Return whether an exception says that the disk is full or cannot be written to."""
    if isinstance(error, OSError):
        return error.errno in _UNWRITABLE
    # torch's own writer raises RuntimeErrors without an errno.
    return isinstance(error, RuntimeError) and any(
        name in str(error) for name in ("PytorchStreamWriter", "inline_container", "iostream error")
    )


def find_engine(error: BaseException) -> Any:
    """Return the trainer, validator or predictor that was running when an exception was raised, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        engine = frame.f_locals.get("self")
        if isinstance(engine, (BaseTrainer, BaseValidator, BasePredictor)) and getattr(engine, "save_dir", None):
            return engine
    return None


def existing_folders(arguments: Mapping[str, Any]) -> frozenset[Path]:
    """Return the folders that exist before a run, where it will put its results.

    Args:
        arguments: Ultralytics' arguments of the run, of which `project` and `name` are read. A relative project is
            relative to the working folder in some releases, to `<runs_dir>/<task>` of Ultralytics' settings in others.

    Returns:
        The run folders themselves that exist, and the closest existing parent of each.
    """
    named = Path(str(arguments.get("project") or ""), str(arguments.get("name") or ""))
    with suppress(OSError, ValueError):  # of a name that no folder can have, which Ultralytics reports itself
        folders = [path.resolve() for path in (named, *(Path(SETTINGS["runs_dir"], task, named) for task in TASKS))]
        parents = (next((parent for parent in folder.parents if parent.is_dir()), folder) for folder in folders)
        return frozenset([*parents, *(folder for folder in folders if folder.is_dir())])
    return frozenset()


def remove_empty_folders(folder: Path, existing: Collection[Path]) -> None:
    """Remove a run folder that holds no file, and those of its parents that were made for it.

    Args:
        folder: The run folder.
        existing: What `existing_folders` returned before the run. Only folders below one of these are removed.
    """
    folder = folder.resolve()
    if folder in existing or not any(parent in folder.parents for parent in existing):
        return
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
    for path in (folder, *folder.parents):
        if path in existing:
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


@contextmanager
def translate_errors(**arguments: Any) -> Iterator[None]:
    """Translate exceptions that user input causes inside the block, as `translate` does; bugs keep their tracebacks.

    A run folder that was made inside the block and holds no file is removed.

    Args:
        **arguments: Ultralytics' arguments of the run inside the block; `project` and `name` tell its folder.

    Raises:
        InputError: Ultralytics cannot use a device, a format or a data set, or the disk is full.
        TrainingError: The loss stayed NaN, or memory ran out.
        Interrupted: The user pressed Ctrl-C.
    """
    existing = existing_folders(arguments)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        translated = translate(error)
        if translated is None:
            raise
        if engine := find_engine(error):
            remove_empty_folders(Path(engine.save_dir), existing)
        if translated is error:
            raise
        raise translated from error
