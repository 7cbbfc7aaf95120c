"""Plain data from a file, turned into the dataclass that it should be, or refused with what is wrong in it."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rtdetr_act.errors import quote

T = TypeVar("T")

MAX_INT = 2**53  # larger ones are not exact in JSON elsewhere, nor in a float
_MAX_DEPTH = 12  # levels of plain data; a plan with the plan that it starts from has six

UnitFloat = Annotated[float, (0.0, 1.0)]
NonNegativeInt = Annotated[int, (0, MAX_INT)]
NonNegativeFloat = Annotated[float, (0.0, 1e15)]


def decode(kind: type[T], data: Any) -> T:
    """Return a dataclass made of plain data: all fields without a default, no others, each of its type.

    Types may be plain ones, `Any` for any plain data, dataclasses, `Literal`, unions with `None`, sequences and
    mappings, and numbers with their range (`UnitFloat`). Text must have UTF-8, and numbers must be finite.

    Raises:
        ValueError: It is not so; the message says where, and what was expected.
    """
    made: T = _decode(kind, data, "")
    return made


def is_json_value(value: Any, deepest: int = _MAX_DEPTH) -> bool:
    """Say whether a value is what JSON holds, so that it is the same again when read back."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= MAX_INT
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return is_utf8(value)
    if deepest == 0:
        return False
    if isinstance(value, (list, tuple)):
        return all(is_json_value(each, deepest - 1) for each in value)
    if isinstance(value, dict):
        return all(
            isinstance(key, str) and is_utf8(key) and is_json_value(each, deepest - 1) for key, each in value.items()
        )
    return False


def is_utf8(value: str) -> bool:
    """Say whether a text can be written to a file; half a surrogate pair cannot, as from a path that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(kind: Any, data: Any, where: str) -> Any:
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
    if kind is str:
        return _check(isinstance(data, str) and is_utf8(data), data, where, "text")
    if kind is bool:
        return _check(isinstance(data, bool), data, where, "true or false")
    if kind is int:
        return _check(type(data) is int and is_json_value(data), data, where, "a whole number")
    if kind is float:
        return float(_check(type(data) in (int, float) and is_json_value(data), data, where, "a number"))
    raise TypeError(f"no rule to read {kind}")


def _decode_fields(kind: Any, data: Any, where: str) -> Any:
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
    return f"{where}.{key}" if where else str(key)


def _check(condition: bool, data: Any, where: str, what: str) -> Any:
    if not condition:
        raise ValueError(f"{where or 'it'} is {quote(data)}, not {what}")
    return data
