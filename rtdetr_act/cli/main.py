"""Run the command line."""

from __future__ import annotations

import sys

# Commands register themselves on import.
from rtdetr_act.cli import deploying, diagnosing, looking, running, searching, studying  # noqa: F401
from rtdetr_act.cli.app import app
from rtdetr_act.errors import RtdetrActError


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and a non-zero exit."""
    # They register their commands.

    try:
        app()
    except RtdetrActError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
