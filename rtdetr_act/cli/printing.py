"""Lines that several commands print."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def print_scores(scores: Mapping[str, float]) -> None:
    """Print the scores of a validation in one line."""
    print("  ".join(f"{name} {score:.4f}" for name, score in scores.items()))


def print_warning(sentence: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {sentence}", file=sys.stderr)
