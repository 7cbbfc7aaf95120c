"""Lines that several commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rtdetr_act.integrations.ultralytics.results import format_scores


def print_scores(scores: Mapping[str, float]) -> None:
    """Print the scores of a validation in one line."""
    print("  ".join(format_scores(scores)))


def print_warning(sentence: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {sentence}", file=sys.stderr)


def print_files(files: Iterable[Path], *commands: str) -> None:
    """Print the files that were written, and what to type next.

    Args:
        files: The files.
        *commands: Command lines without `rtdetr-act`.
    """
    for path in files:
        print(f"file: {path}")
    print_next(*commands)


def print_next(*commands: str) -> None:
    """Print what to type next.

    Args:
        *commands: Command lines without `rtdetr-act`.
    """
    for line in commands:
        print(f"next: rtdetr-act {line}")
