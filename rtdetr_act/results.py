"""What functions return to users: a short repr, plain data, and tables as CSV."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rtdetr_act.files import convert_write_errors, write_atomically

Table = tuple[Sequence[str], Iterable[Sequence[object]]]


class Result:
    """Base class of the frozen dataclasses that are returned to users, declared with `@dataclass(repr=False)`.

    Subclasses implement `_summarise`. Those with fields that are not plain data, such as modules, override `to_dict`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Size(Result):
    ...     side: int
    ...     gflops: float = math.nan
    ...
    ...     def _summarise(self) -> str:
    ...         return f"{self.side} pixels"
    >>> Size(640), Size(640).to_dict()
    (<Size: 640 pixels>, {'side': 640, 'gflops': None})
    """

    def _summarise(self) -> str:
        """Return the result in a few words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the class and a summary in one line, without the contents of the fields."""
        return f"<{type(self).__name__}: {self._summarise()}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data for `json.dumps`, with None for numbers that are not finite."""
        return {field.name: to_plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


class TableResult(Result):
    """Base class of results that are tables; subclasses implement `_make_table`, too."""

    def _make_table(self) -> Table:
        """Return the titles of the columns, and the rows."""
        raise NotImplementedError

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as CSV, with empty cells for unknown values.

        Args:
            path: File to write it to as well, in UTF-8, whole or not at all. Default: None, no file.

        Raises:
            InputError: The file cannot be written; an old one is then unchanged.
        """
        header, rows = self._make_table()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_format_cell(value) for value in row] for row in rows)
        if path is not None:
            with convert_write_errors(Path(path)):
                write_atomically(Path(path), text.getvalue().encode())
        return text.getvalue()


def to_plain(value: Any) -> Any:
    """Return a value as plain data for `json.dumps`: dictionaries, lists, text, finite numbers, booleans and None.

    Args:
        value: Plain data, or results, dataclasses, paths, tuples and sets of it, in any nesting.

    Raises:
        TypeError: A part of it is something else.

    >>> to_plain({"scores": (0.5, math.nan), "folder": Path("runs")})
    {'scores': [0.5, None], 'folder': 'runs'}
    """
    if isinstance(value, Result):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [to_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a {type(value).__name__} is not plain data")


def _format_cell(value: object) -> object:
    """Return a value as the csv module writes it: "" if it is unknown, "true" or "false" for a boolean."""
    plain = to_plain(value)
    return str(plain).lower() if isinstance(plain, bool) else "" if plain is None else plain
