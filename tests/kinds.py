"""The kinds of tests: what each may do, and what holds it to that.

A test is `unit` unless a mark or a fixture says otherwise. What starts processes, trains, exports, kills or fills the
disk fails in a test that is not marked so; `pytest -m unit` therefore stays quick. Models of full size and torch's
compiler belong to integration by their time alone.
"""

from __future__ import annotations

import functools
import multiprocessing.process
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import wrapt

# From the quickest to the slowest; each may do what those before it may.
KINDS = ("unit", "integration", "kill")
# The kind of a test that asks for one of these: another test may have made the fixture before, which hides the call.
FIXTURES = {
    **dict.fromkeys(("stock_run", "rows_run", "patched_run", "mish_run"), "integration"),
    "resumed": "kill",
}
_current: pytest.Item | None = None


def settle(item: pytest.Item) -> None:
    """Mark a test that names no kind with the one that its fixtures need; raise UsageError where it names two."""
    named = {mark.name for mark in item.iter_markers()} & set(KINDS)
    if len(named) > 1:
        raise pytest.UsageError(f"{item.nodeid} is marked {' and '.join(sorted(named))}; a test has one kind")
    if not named and isinstance(item, pytest.DoctestItem):
        item.add_marker("integration")  # an example may do whatever users do
    elif not named:
        needed = [FIXTURES[name] for name in getattr(item, "fixturenames", ()) if name in FIXTURES]
        item.add_marker(max(needed, key=KINDS.index, default=KINDS[0]))


@contextmanager
def held_to(item: pytest.Item) -> Iterator[None]:
    """Let the calls that a kind forbids fail while a test, its setup included, runs."""
    global _current
    _current = item
    try:
        yield
    finally:
        _current = None


def watch() -> None:
    """Wrap the calls that not every kind of test may make."""
    _require(subprocess.Popen, "__init__", "integration", "starts a process", _is_python)
    _require(multiprocessing.process.BaseProcess, "start", "integration", "starts a process")
    _require(subprocess.Popen, "send_signal", "kill", "signals a process")  # terminate() and kill() call it
    _require(signal, "raise_signal", "kill", "signals its own process")
    if os.name == "posix":
        import resource

        _require(os, "fork", "integration", "starts a process")
        _require(resource, "setrlimit", "kill", "limits what the system grants")

    @wrapt.when_imported("ultralytics.engine.trainer")
    def watch_training(module: Any) -> None:
        _require(module.BaseTrainer, "train", "integration", "trains")

    @wrapt.when_imported("ultralytics.engine.exporter")
    def watch_export(module: Any) -> None:
        _require(module.Exporter, "__init__", "integration", "exports")


def _is_python(_: Any, args: Any, *more: Any, **settings: Any) -> bool:
    """Say whether an interpreter is started, not one of the small programs that libraries ask about the machine."""
    words = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    return os.fsdecode(words[0]).startswith(sys.executable)


def _require(
    owner: Any, name: str, kind: str, does: str, counts: Callable[..., bool] = lambda *args, **kwargs: True
) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = _kind_of(_current) if _current is not None and counts(*args, **kwargs) else KINDS[-1]
        if KINDS.index(found) < KINDS.index(kind):
            pytest.fail(f"a test marked {found} {does}; mark it {kind}", pytrace=False)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def _kind_of(item: pytest.Item) -> str:
    return next(mark.name for mark in item.iter_markers() if mark.name in KINDS)
