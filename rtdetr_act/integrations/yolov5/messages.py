"""Messages beside the output of a script."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Print a line to stderr, on the first worker of a distributed training only; stdout is the script's own."""
    if os.environ.get("RANK", "-1") in ("-1", "0"):
        print(f"rtdetr-act: {text}", file=sys.stderr, flush=True)
