"""Unambiguous names of variants, values and folders."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.errors import escape
from rtdetr_act.integrations.ultralytics.runs import slug

_MAX_FOLDER_CHARS = 60  # of a folder name, without hash and seed
_MAX_VALUE_CHARS = 100  # of a value in a name
_MAX_FOLDER_BYTES = 200  # of a folder name, without hash and seed; file systems allow 255 in total
# Device names of Windows, reserved with any suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)


def to_single_line(text: str) -> str:
    """Return a string in one line, with single spaces and escaped unprintable characters."""
    return escape(" ".join(text.split()))


def name_paths(paths: Sequence[str]) -> list[str]:
    """Return a short distinct name for each of several paths: its stem, or as much of its end as is needed.

    >>> name_paths(["a/data.yaml", "b/data.yaml", "c/other.yaml"]), name_paths(["x.yaml", "x.yml"])
    (['a/data', 'b/data', 'other'], ['x.yaml', 'x.yml'])
    """
    return _choose_distinct(paths, _list_path_names)


def name_values(values: Sequence[Any]) -> list[str]:
    """Return a distinct name for each of several different values: its `str`, or its `repr` if two look alike.

    >>> name_values([0.1, "fast"]), name_values([1, "1"])
    (['0.1', 'fast'], ['1', "'1'"])
    """
    return _choose_distinct(values, lambda value: [*map(shorten, (str(value), repr(value))), _escape_value(value)])


def _choose_distinct(items: Sequence[Any], list_names: Callable[[Any], list[str]]) -> list[str]:
    """Return the first candidate name of each item that no other item has.

    Args:
        items: The items.
        list_names: Function that returns the candidates of an item, the preferred one first. Items whose names look
            alike all move on to their next candidates.
    """
    candidates = [list_names(item) for item in items]
    chosen = [0] * len(items)
    while True:
        names = [each[index] for each, index in zip(candidates, chosen, strict=True)]
        counts = Counter(map(_normalise_appearance, names))
        ambiguous = [
            number
            for number, name in enumerate(names)
            if (counts[_normalise_appearance(name)] > 1 or not name or name != to_single_line(name))
            and chosen[number] + 1 < len(candidates[number])
        ]
        if not ambiguous:
            return names
        for number in ambiguous:
            chosen[number] += 1


def _escape_value(value: Any) -> str:
    """Return a value in printable ASCII with no two adjacent spaces, which HTML would collapse."""
    return ascii(value).replace("  ", " \\x20")


def shorten(text: str) -> str:
    """Return a string, or if it is long its beginning with a hash of the whole."""
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_FOLDER_CHARS]}…{_hash(text)[:6]}"


def _hash(text: str) -> str:
    """Return the SHA-256 of a string in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _normalise_appearance(name: str) -> str:
    """Return a form that is equal for names that look alike."""
    return " ".join(unicodedata.normalize("NFKC", name).split())


def _list_path_names(text: str) -> list[str]:
    """Return candidate names of a path, the shortest first."""
    path = Path(text)
    parents = [part for part in path.parts[:-1] if part != path.anchor]
    before = ["".join(f"{part}/" for part in parents[len(parents) - count :]) for count in range(len(parents) + 1)]
    # The folder is more informative than the suffix.
    near = [path.stem, *(each + path.stem for each in before[1:2]), *(each + path.name for each in before[:2])]
    far = [each + name for each in before[2:] for name in (path.stem, path.name)]
    return [*near, *far, text, _escape_value(text)]


def make_value_key(value: Any) -> Hashable:
    """Return a key that is equal for values that configure the same training: 1 and 1.0, but not 1 and True or "1"."""
    if isinstance(value, (list, tuple)):
        return tuple(map(make_value_key, value))
    if isinstance(value, (dict, set)):
        return (type(value).__name__, repr(value))
    return ("number" if type(value) in (int, float) else type(value).__name__, value)


def make_path_key(text: str) -> Hashable:
    """Return a key that is equal for paths of the same file."""
    try:
        status = Path(text).stat()
    except (OSError, ValueError):  # the name of a model or data set that is resolved elsewhere
        return str(Path(text))
    return (status.st_dev, status.st_ino)


def name_folders(variants: Sequence[str]) -> dict[str, str]:
    """Return a folder name per variant, legal and distinct on all file systems.

    A hash is appended to names that some file system would not distinguish.

    Args:
        variants: Distinct names of variants.
    """
    plain = {variant: _make_legal(slug(variant)[:_MAX_FOLDER_CHARS]) for variant in variants}
    counts = Counter(map(_normalise_for_file_systems, plain.values()))
    names = {variant: name for variant, name in plain.items() if counts[_normalise_for_file_systems(name)] == 1}
    taken = set(map(_normalise_for_file_systems, names.values()))
    for variant in variants:
        if variant in names:
            continue
        digest = _hash(variant)
        candidates = (f"{plain[variant]}-{digest[:length]}" for length in range(6, len(digest) + 1))
        names[variant] = next(name for name in candidates if _normalise_for_file_systems(name) not in taken)
        taken.add(_normalise_for_file_systems(names[variant]))
    return names


def _make_legal(name: str) -> str:
    """Return a folder name that Windows does not reserve and that is not too long."""
    if _RESERVED.match(name):
        name = f"_{name}"
    while len(name.encode()) > _MAX_FOLDER_BYTES:
        name = name[:-1]
    return name


def _normalise_for_file_systems(name: str) -> str:
    """Return a form that is equal for names that a file system without case or Unicode distinctions identifies."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
