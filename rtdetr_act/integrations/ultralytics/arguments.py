"""Arguments of Ultralytics: read from `key=value` words, checked with suggestions."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.utils.torch_utils import select_device

from rtdetr_act.errors import (
    InputError,
    quote,
    reason,
    suggest,
)
from rtdetr_act.integrations.ultralytics.argument_ranges import check_ranges
from rtdetr_act.integrations.ultralytics.failures import one_sentence


def check_counts(**counts: object) -> None:
    """Check that each is a whole number from 1: Ultralytics' `imgsz` may be a list, its `batch` a share of the memory.

    Raises:
        InputError: One is not.
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{name} is one whole number from 1 here, not {quote(count)}")


def check_file_name(source: str) -> None:
    """Refuse what no file can be called, such as 300 characters; raises InputError."""
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:  # ValueError: a zero byte, before Python 3.12
        raise InputError(f"{quote(source)} cannot be the name of a file: {reason(error)}") from None


def parse_arguments(pairs: Iterable[str], taken: Iterable[str] = ()) -> dict[str, Any]:
    """Turn `key=value` words into Ultralytics arguments, checked as `check_arguments` does; raises InputError."""
    arguments = split_pairs(pairs)
    check_arguments(arguments, taken)
    return arguments


def split_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` words into values by key: Python literals, `True`, `none` and the like in any case, or text.

    Raises:
        InputError: A word is no pair.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{quote(pair)} is not an argument: write key=value, such as epochs=100")
        arguments[key] = _parse_value(value)
    return arguments


def check_arguments(arguments: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Check Ultralytics arguments, with a suggestion where Ultralytics has no such key.

    Args:
        arguments: Their values by key.
        taken: Keys that the caller sets itself.

    Raises:
        InputError: A key is unknown or taken, or a value has a wrong type.
    """
    for key, value in arguments.items():
        if key in taken:
            raise InputError(f"'{key}' is set by this command itself: leave {quote(f'{key}={value}')} out")
        if key not in DEFAULT_CFG_DICT:
            hint = suggest(key, DEFAULT_CFG_DICT) or ", see docs.ultralytics.com/usage/cfg"
            raise InputError(f"Ultralytics has no argument {quote(key)}{hint}")
    try:
        get_cfg(overrides=dict(arguments))
    except (TypeError, ValueError, SyntaxError, KeyError, OverflowError) as error:
        raise InputError(reason(error)) from None
    check_ranges(arguments)


def _parse_value(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as of '{[]: 1}' and of '((((…'
        return text


def check_device(device: Any) -> None:
    """Check a device as Ultralytics does once a run has its folder already; raises InputError."""
    with one_sentence():
        select_device("" if device is None else device, verbose=False)
