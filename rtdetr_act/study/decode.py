"""Validation of plain data from a JSON or YAML file, and its conversion to dataclasses."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rtdetr_act.errors import quote

T = TypeVar("T")

MAX_INT = 2**53  # the largest integer up to which every JSON parser and float is exact
_MAX_DEPTH = 12  # levels of nesting; a plan with its initial plan has six

UnitFloat = Annotated[float, (0.0, 1.0)]
NonNegativeInt = Annotated[int, (0, MAX_INT)]
NonNegativeFloat = Annotated[float, (0.0, 1e15)]


def decode(kind: type[T], data: Any) -> T:
    """Return an instance of a type created from plain data.

    Data of a dataclass must have all fields without a default and no others. Numbers must be finite, and strings
    encodable as UTF-8.

    Args:
        kind: Type of the result: a dataclass, scalar, sequence or mapping. Its parts may also be `Any` for any plain
            data, `Literal`, unions with `None`, and numbers annotated with a range, such as `UnitFloat`.
        data: Plain data, as from a JSON file.

    Raises:
        ValueError: The data does not fit the type; the message says where, and what was expected.
    """
    decoded: T = _decode(kind, data, "")
    return decoded


def is_json_value(value: Any, max_depth: int = _MAX_DEPTH) -> bool:
    """Return whether a value is unchanged after it is written to JSON and read back.

    Args:
        value: Any value.
        max_depth: Maximum nesting of lists and dictionaries.
    """
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= MAX_INT
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return is_utf8(value)
    if max_depth == 0:
        return False
    if isinstance(value, (list, tuple)):
        return all(is_json_value(each, max_depth - 1) for each in value)
    if isinstance(value, dict):
        return all(
            isinstance(key, str) and is_utf8(key) and is_json_value(each, max_depth - 1) for key, each in value.items()
        )
    return False


def is_utf8(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8; one with lone surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(kind: Any, data: Any, where: str) -> Any:
    """Return plain data converted to a type; `where` is its position in the file, for messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _check(is_json_value(data), data, where, "text, numbers, lists and mappings only")
    if is_dataclass(kind):
        return _decode_fields(kind, data, where)
    if origin is Annotated:
        value, (low, high) = _decode(arguments[0], data, where), arguments[1]
        return _check(low <= value <= high, value, where, f"a number from {low:g} to {high:g}")
    if origin is Literal:
        words = ", ".join(map(str, arguments))
        return _check(isinstance(data, str) and data in arguments, data, where, f"one of {words}")
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _decode(next(each for each in arguments if each is not type(None)), data, where)
    if origin in (list, tuple, Sequence):
        _check(isinstance(data, list), data, where, "a list")
        values = (_decode(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(data))
        return tuple(values) if origin is tuple else list(values)
    if origin in (dict, Mapping):
        _check(isinstance(data, dict), data, where, "a mapping")
        return {
            _decode(arguments[0], key, f"a key of {where}"): _decode(arguments[1], value, _join_path(where, key))
            for key, value in data.items()
        }
    return _decode_scalar(kind, data, where)


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    """Return a string, boolean or number of the given type."""
    if kind is str:
        return _check(isinstance(data, str) and is_utf8(data), data, where, "text")
    if kind is bool:
        return _check(isinstance(data, bool), data, where, "true or false")
    if kind is int:
        return _check(type(data) is int and is_json_value(data), data, where, "a whole number")
    if kind is float:
        return float(_check(type(data) in (int, float) and is_json_value(data), data, where, "a number"))
    raise TypeError(f"unsupported type {kind}")


def _decode_fields(kind: Any, data: Any, where: str) -> Any:
    """Return an instance of a dataclass with its fields from a mapping."""
    _check(isinstance(data, dict), data, where, "a mapping")
    hints = get_type_hints(kind, include_extras=True)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where or 'it'} has an unknown key {quote(key)}")
    for field in fields(kind):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where or 'it'} has no '{field.name}'")
    return kind(**{key: _decode(hints[key], value, _join_path(where, key)) for key, value in data.items()})


def _join_path(where: str, key: Any) -> str:
    """Return the position of an item in the file, such as `sites.name`."""
    return f"{where}.{key}" if where else str(key)


def _check(condition: bool, data: Any, where: str, what: str) -> Any:
    """Return the data if a condition holds, else raise ValueError."""
    if not condition:
        raise ValueError(f"{where or 'it'} is {quote(data)}, not {what}")
    return data
