"""Plain data from a file, turned into the dataclass that it should be, or refused with what is wrong in it."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rtdetr_act.errors import quote

T = TypeVar("T")

MOST_INT = 2**53  # larger ones are not exact in JSON elsewhere, nor in a float
_DEEPEST = 12  # levels of plain data; a plan with the plan that it starts from has six

Fraction = Annotated[float, (0.0, 1.0)]
Count = Annotated[int, (0, MOST_INT)]
Amount = Annotated[float, (0.0, 1e15)]


def decode(kind: type[T], data: Any) -> T:
    """Return a dataclass made of plain data: all fields without a default, no others, each of its type.

    Types may be plain ones, `Any` for any plain data, dataclasses, `Literal`, unions with `None`, sequences and
    mappings, and numbers with their range (`Fraction`). Text must have UTF-8, and numbers must be finite.

    Raises:
        ValueError: It is not so; the message says where, and what was expected.
    """
    made: T = _decode(kind, data, "")
    return made


def is_plain(value: Any, deepest: int = _DEEPEST) -> bool:
    """Say whether a value is what JSON holds, so that it is the same again when read back."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= MOST_INT
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return is_text(value)
    if deepest == 0:
        return False
    if isinstance(value, (list, tuple)):
        return all(is_plain(each, deepest - 1) for each in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_text(key) and is_plain(each, deepest - 1) for key, each in value.items())
    return False


def is_text(value: str) -> bool:
    """Say whether a text can be written to a file; half a surrogate pair cannot, as from a path that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _expect(is_plain(data), data, where, "text, numbers, lists and mappings only")
    if is_dataclass(kind):
        return _decode_fields(kind, data, where)
    if origin is Annotated:
        value, (low, high) = _decode(arguments[0], data, where), arguments[1]
        return _expect(low <= value <= high, value, where, f"a number from {low:g} to {high:g}")
    if origin is Literal:
        words = ", ".join(map(str, arguments))
        return _expect(isinstance(data, str) and data in arguments, data, where, f"one of {words}")
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _decode(next(each for each in arguments if each is not type(None)), data, where)
    if origin in (list, tuple, Sequence):
        _expect(isinstance(data, list), data, where, "a list")
        values = (_decode(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(data))
        return tuple(values) if origin is tuple else list(values)
    if origin in (dict, Mapping):
        _expect(isinstance(data, dict), data, where, "a mapping")
        return {
            _decode(arguments[0], key, f"a key of {where}"): _decode(arguments[1], value, _below(where, key))
            for key, value in data.items()
        }
    return _decode_scalar(kind, data, where)


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is str:
        return _expect(isinstance(data, str) and is_text(data), data, where, "text")
    if kind is bool:
        return _expect(isinstance(data, bool), data, where, "true or false")
    if kind is int:
        return _expect(type(data) is int and is_plain(data), data, where, "a whole number")
    if kind is float:
        return float(_expect(type(data) in (int, float) and is_plain(data), data, where, "a number"))
    raise TypeError(f"no rule to read {kind}")


def _decode_fields(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, where, "a mapping")
    hints = get_type_hints(kind, include_extras=True)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where or 'it'} has an unknown key {quote(key)}")
    for field in fields(kind):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where or 'it'} has no '{field.name}'")
    return kind(**{key: _decode(hints[key], value, _below(where, key)) for key, value in data.items()})


def _below(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _expect(condition: bool, data: Any, where: str, what: str) -> Any:
    if not condition:
        raise ValueError(f"{where or 'it'} is {quote(data)}, not {what}")
    return data
