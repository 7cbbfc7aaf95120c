"""What things of a study are called: no two of them alike, on paper and on a disk."""

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

_MAX_FOLDER_CHARS = 60  # characters of a folder's name before its hash and its seed
_MAX_VALUE_CHARS = 100  # characters of a value in a name
_MAX_FOLDER_BYTES = 200  # of those; file systems allow 255 for the whole name
# Windows keeps them for devices, with any suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)


def to_single_line(text: str) -> str:
    """Return a text in one line, with single blanks and what is not visible escaped."""
    return escape(" ".join(text.split()))


def name_paths(paths: Sequence[str]) -> list[str]:
    """Return a short name for each of several paths: its stem, or as much of its end as tells it from the others.

    >>> name_paths(["a/data.yaml", "b/data.yaml", "c/other.yaml"]), name_paths(["x.yaml", "x.yml"])
    (['a/data', 'b/data', 'other'], ['x.yaml', 'x.yml'])
    """
    return _choose_distinct(paths, _list_path_names)


def name_values(values: Sequence[Any]) -> list[str]:
    """Return how each of several different values is written: as Python prints it, quoted where two look alike.

    >>> name_values([0.1, "fast"]), name_values([1, "1"])
    (['0.1', 'fast'], ['1', "'1'"])
    """
    return _choose_distinct(values, lambda value: [*map(shorten, (str(value), repr(value))), _escape_value(value)])


def _choose_distinct(things: Sequence[Any], forms_of: Callable[[Any], list[str]]) -> list[str]:
    """Give each thing the first of its forms that no other has; those that look alike go on to the next together."""
    forms = [forms_of(thing) for thing in things]
    chosen = [0] * len(things)
    while True:
        names = [each[index] for each, index in zip(forms, chosen, strict=True)]
        counts = Counter(map(_visible_form, names))
        unclear = [
            number
            for number, name in enumerate(names)
            if (counts[_visible_form(name)] > 1 or not name or name != to_single_line(name))
            and chosen[number] + 1 < len(forms[number])
        ]
        if not unclear:
            return names
        for number in unclear:
            chosen[number] += 1


def _escape_value(value: Any) -> str:
    """Return a value in visible characters, different for different ones; of several blanks, pages show one."""
    return ascii(value).replace("  ", " \\x20")


def shorten(text: str) -> str:
    """Return a short text for a long one, different for different ones."""
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_FOLDER_CHARS]}…{_hash(text)[:6]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _visible_form(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).split())


def _list_path_names(text: str) -> list[str]:
    path = Path(text)
    parents = [part for part in path.parts[:-1] if part != path.anchor]
    before = ["".join(f"{part}/" for part in parents[len(parents) - count :]) for count in range(len(parents) + 1)]
    # The folder tells more than the suffix.
    near = [path.stem, *(each + path.stem for each in before[1:2]), *(each + path.name for each in before[:2])]
    far = [each + name for each in before[2:] for name in (path.stem, path.name)]
    return [*near, *far, text, _escape_value(text)]


def value_identity(value: Any) -> Hashable:
    """Return what is equal for two values that set up the same training: 1 and 1.0, but not 1 and True, nor "1"."""
    if isinstance(value, (list, tuple)):
        return tuple(map(value_identity, value))
    return ("number" if type(value) in (int, float) else type(value).__name__, value)


def path_identity(text: str) -> Hashable:
    """Return what is equal for two paths of the same file."""
    try:
        found = Path(text).stat()
    except (OSError, ValueError):  # the name of a model or data set that is found elsewhere
        return str(Path(text))
    return (found.st_dev, found.st_ino)


def name_folders(variants: Sequence[str]) -> dict[str, str]:
    """Return a folder name per variant, legal everywhere, with a hash where two would be the same on some disk."""
    plain = {variant: _make_legal(slug(variant)[:_MAX_FOLDER_CHARS]) for variant in variants}
    counts = Counter(map(_file_system_form, plain.values()))
    names = {variant: name for variant, name in plain.items() if counts[_file_system_form(name)] == 1}
    taken = set(map(_file_system_form, names.values()))
    for variant in variants:
        if variant in names:
            continue
        digest = _hash(variant)
        candidates = (f"{plain[variant]}-{digest[:length]}" for length in range(6, len(digest) + 1))
        names[variant] = next(name for name in candidates if _file_system_form(name) not in taken)
        taken.add(_file_system_form(names[variant]))
    return names


def _make_legal(name: str) -> str:
    if _RESERVED.match(name):
        name = f"_{name}"
    while len(name.encode()) > _MAX_FOLDER_BYTES:
        name = name[:-1]
    return name


def _file_system_form(name: str) -> str:
    """Return what is equal for two names of one folder where upper and lower case are, or composed letters."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
