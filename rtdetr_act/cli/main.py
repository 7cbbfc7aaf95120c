"""Run the command line."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Importing these registers their commands, and `--help` lists them in this order.
# isort: off
from rtdetr_act.cli import train, validate, compare, convert, sensitivity, deploy, diagnose, doctor, activations, sites  # noqa: F401
from rtdetr_act.cli import maps, bench, study, search, script, checks  # noqa: F401

# isort: on
from rtdetr_act.cli.app import app
from rtdetr_act.cli.printing import print_warning
from rtdetr_act.errors import RtdetrActError, RtdetrActWarning


def main() -> None:
    """Run the command line; a user error is one sentence on stderr and a non-zero exit code."""
    try:
        with summarized_warnings():
            app()
    except RtdetrActError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def summarized_warnings() -> Iterator[None]:
    """Count the Python warnings of other packages, and print one line for all of them at the end.

    They are printed as always if the user set a warning filter, by `PYTHONWARNINGS` or `python -W`.
    """
    if sys.warnoptions:
        yield
        return
    counts: Counter[str] = Counter()

    def show(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        package = _find_package(filename)
        if package == "rtdetr_act" or issubclass(category, RtdetrActWarning):
            print_warning(str(message))
        else:
            counts[package] += 1

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        if counts:
            found = ", ".join(f"{package} {count}" for package, count in counts.most_common())
            print_warning(f"hidden warnings of other packages: {found}; PYTHONWARNINGS=default shows them")


def _find_package(filename: str) -> str:
    """Return the package that a source file belongs to.

    >>> _find_package("/env/lib/python3.11/site-packages/torch/jit/_trace.py"), _find_package("train.py")
    ('torch', 'train')
    """
    parts = Path(filename).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    return "rtdetr_act" if "rtdetr_act" in parts else Path(filename).stem
