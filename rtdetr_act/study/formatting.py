"""Numbers and lists as the page writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "–"
MAX_LISTED = 12


def join_words(words: Sequence[str]) -> str:
    """Join words by commas and an "and", the first twelve of them."""
    shown = list(words[:MAX_LISTED])
    if len(words) > len(shown):
        return f"{', '.join(shown)} and {len(words) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def format_count(number: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_score(value: float | None, sign: str = "") -> str:
    """Write a score, with `sign` "+" a difference of scores."""
    return format_number(value, f"{{:{sign}.3f}}")


def format_p(value: float) -> str:
    """Write a p-value."""
    return "< 0.001" if value < 0.001 else format_score(value)


def format_number(value: float | None, form: str) -> str:
    """Write a number in a format, with a true minus; a dash where it is unknown."""
    return UNKNOWN if finite_or_none(value) is None else form.format(value).replace("-", "−")


def finite_or_none(value: float | None) -> float | None:
    """Return a number, or None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
