"""Tables in plain text, in Markdown and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_BAR = r"\|"  # a vertical bar in a cell of a Markdown table


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines of text with aligned columns.

    Args:
        rows: Rows of equal length, one or more.

    >>> align_columns([("section", "sites"), ("neck", "8")])
    ['section  sites', 'neck     8']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: Sequence[str] = ()) -> str:
    r"""Return a table in Markdown, with the vertical bars inside cells escaped.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as there are titles.
        alignment: Delimiter of each column, such as "---:" for alignment to the right; "---" everywhere if empty.

    >>> print(format_markdown_table(("plan", "runs"), [("a|b", "3")], ("---", "---:")))
    | plan | runs |
    | --- | ---: |
    | a\|b | 3 |
    """
    lines = [header, alignment or ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)


def print_wide_table(table: Table) -> None:
    """Print a table of many columns, 160 characters wide outside of a terminal."""
    console = Console()
    # A file or a pipe has no width of its own, and Rich would assume 80 columns.
    (console if console.is_terminal else Console(width=160)).print(table)
