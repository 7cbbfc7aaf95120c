"""Formatting of numbers and lists in reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "–"  # in place of an unknown number
MAX_LISTED = 12  # words in a sentence


def join_words(words: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Return words joined by commas and "and"; of more than `limit`, the first ones and the number of the others.

    >>> join_words(["arelu", "mish"]), join_words("abcd", 3)
    ('arelu and mish', 'a, b, c and 1 more')
    """
    shown = list(words[:limit])
    if len(words) > len(shown):
        return f"{', '.join(shown)} and {len(words) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural, such as "3 runs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_score(value: float | None, sign: str = "") -> str:
    """Return a score with three decimals, or a dash if it is unknown; `sign="+"` shows the sign of a difference."""
    return format_number(value, f"{{:{sign}.3f}}")


def format_p(value: float) -> str:
    """Return a p-value with three decimals, or "< 0.001".

    >>> format_p(0.04321), format_p(2e-7)
    ('0.043', '< 0.001')
    """
    return "< 0.001" if value < 0.001 else format_score(value)


def format_number(value: float | None, form: str) -> str:
    """Return a number in a format such as "{:.2f}", with a typographic minus, or a dash if it is unknown."""
    return UNKNOWN if finite_or_none(value) is None else form.format(value).replace("-", "−")


def finite_or_none(value: float | None) -> float | None:
    """Return a number, or None for NaN, infinity and None."""
    return value if value is not None and math.isfinite(value) else None
