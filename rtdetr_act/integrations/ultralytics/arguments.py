"""Parse Ultralytics' arguments from `key=value` words, and check them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.utils.torch_utils import select_device

from rtdetr_act.errors import InputError, quote, reason, suggest
from rtdetr_act.integrations.ultralytics.argument_ranges import check_ranges
from rtdetr_act.integrations.ultralytics.failures import translate_errors

if TYPE_CHECKING:
    from torch import nn


def parse_arguments(
    pairs: Iterable[str], reserved: Iterable[str] = (), suggestions: Iterable[str] = ()
) -> dict[str, Any]:
    """Parse `key=value` words into Ultralytics arguments, and check them.

    Args:
        pairs: Words such as "epochs=100".
        reserved: Keys that the command sets itself.
        suggestions: As in `check_arguments`.

    Returns:
        Values by key, as `split_pairs` parses them.

    Raises:
        InputError: A word is not a pair, a key is unknown or reserved, or a value has a wrong type or is out of range.
    """
    arguments = split_pairs(pairs)
    check_arguments(arguments, reserved, suggestions)
    return arguments


def split_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` words into values by key.

    A value is a Python literal, or True, False or None in any case (`none`, `null`), or else the text itself.

    Raises:
        InputError: A word is not a pair.

    >>> split_pairs(["epochs=100", "imgsz=[640, 480]", "cos_lr=true", "name=first"])
    {'epochs': 100, 'imgsz': [640, 480], 'cos_lr': True, 'name': 'first'}
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{quote(pair)} is not an argument: write key=value, such as epochs=100")
        arguments[key] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> Any:
    constants = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (
        ValueError,
        SyntaxError,
        TypeError,
        RecursionError,
        MemoryError,
    ):  # "{[]: 1}" and "((((…" raise the last ones
        return text


def check_arguments(
    arguments: Mapping[str, Any], reserved: Iterable[str] = (), suggestions: Iterable[str] = ()
) -> None:
    """Check Ultralytics arguments; an unknown key is answered with a suggestion.

    Args:
        arguments: Values by key.
        reserved: Keys that the caller sets itself.
        suggestions: Keys that an unknown one may stand for, beside those of Ultralytics.

    Raises:
        InputError: A key is unknown or reserved, or a value has a wrong type or is out of range.
    """
    for key, value in arguments.items():
        if key in reserved:
            raise InputError(f"'{key}' is set by this command itself: leave {quote(f'{key}={value}')} out")
        if key not in DEFAULT_CFG_DICT:
            hint = suggest(key, [*suggestions, *DEFAULT_CFG_DICT]) or ", see docs.ultralytics.com/usage/cfg"
            raise InputError(f"Ultralytics has no argument {quote(key)}{hint}")
    try:
        get_cfg(overrides=dict(arguments))
    except (TypeError, ValueError, SyntaxError, KeyError, OverflowError) as error:
        raise InputError(reason(error)) from None
    check_ranges(arguments)


def set_project(arguments: dict[str, Any], task: str) -> None:
    """Let results go to `runs/<task>` of the working folder, unless the arguments name a `project`.

    Ultralytics' own default is the `runs_dir` of its settings, which may be a folder of another project.
    """
    if not arguments.get("project"):
        arguments["project"] = str(Path("runs", task).absolute())


def check_positive_integers(**values: object) -> None:
    """Check that every value is an integer of at least 1.

    Ultralytics' `imgsz` may also be a list and its `batch` a fraction of the GPU memory; benchmarks and diagnoses take
    neither.

    Raises:
        InputError: A value is not a positive integer.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be one positive integer here, not {quote(value)}")


def check_file_name(source: str) -> None:
    """Check that a text can be a file name; one of 300 characters cannot.

    Raises:
        InputError: The system refuses the name.
    """
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
        raise InputError(f"{quote(source)} cannot be the name of a file: {reason(error)}") from None


def check_device(device: Any) -> None:
    """Check a device as Ultralytics does, before a run folder is made.

    Args:
        device: Ultralytics' `device`, such as "cpu", 0 or [0, 1]; None to let Ultralytics choose.

    Raises:
        InputError: The device does not exist here.
    """
    with translate_errors():
        select_device("" if device is None else device, verbose=False)


def move_to(module: nn.Module, device: Any) -> nn.Module:
    """Move a module to a single device.

    Args:
        module: The module, moved in place.
        device: What `torch.nn.Module.to` takes: "cpu", "cuda:1" or an index.

    Raises:
        InputError: The device does not exist here, or is not a single one.
    """
    if not isinstance(device, (str, int)) or isinstance(device, bool):
        raise InputError(f"device must be a single one, such as cpu or cuda:1, not {quote(device)}")
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"device {quote(str(device))} cannot be used: {first_line}") from None
