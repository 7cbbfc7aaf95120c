"""Run the command line."""

from __future__ import annotations

import sys

# Importing these registers their commands, and `--help` lists them in this order.
# isort: off
from rtdetr_act.cli import train, validate, deploy, diagnose, activations, sites, bench, study, search  # noqa: F401

# isort: on
from rtdetr_act.cli.app import app
from rtdetr_act.errors import RtdetrActError


def main() -> None:
    """Run the command line; a user error is one sentence on stderr and a non-zero exit code."""
    try:
        app()
    except RtdetrActError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
