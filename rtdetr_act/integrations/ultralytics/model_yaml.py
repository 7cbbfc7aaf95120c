"""Validate a model YAML before Ultralytics builds it, and explain errors raised while building it.

Ultralytics' `parse_model` looks up a row's module in its globals, so a row could call any function there, including
`torch_load`, which executes code in a file. Here a row can only name a layer.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rtdetr_act.errors import SpecError, quote, raising_module, reason, suggest

if TYPE_CHECKING:
    from torch import nn

_PARTS = ("backbone", "head")
_MAX_ROWS, _MAX_REPEATS, _MAX_VALUES, _MAX_DEPTH = 1000, 1000, 10_000, 5  # repeats are those of all rows together
_MAX_NUMBER = 1_000_000_000  # largest absolute value of a number; no memory holds a layer with as many channels
# The exceptions that Ultralytics, torch's constructors and a first forward pass raise for invalid arguments.
BUILD_ERRORS = (
    TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError, NameError,
    MemoryError, SyntaxError,
)  # fmt: skip
# Modules whose errors are caused by the YAML; a dynamic convolution passes the arguments of a row to torch.
_BUILDERS = ("ultralytics.", "torch.", "torchvision.", "ast", "rtdetr_act.activations.dynamic_conv")


def check_form(model_yaml: Mapping[str, Any]) -> None:
    """Check the types, ranges and sizes of all values in a model YAML whose rows have four items.

    Raises:
        SpecError: A value is invalid; the message names its key or row.
    """
    for key in ("nc", "ch", "channels", "reg_max"):
        if (value := model_yaml.get(key)) is not None:
            _require(_is_count(value), f"'{key}' is a whole number from 1, not {quote(value)}")
    _require(model_yaml.get("nc") is not None, "it has no 'nc', the number of classes")
    for key in ("depth_multiple", "width_multiple"):
        if key in model_yaml:
            _require(_is_factor(model_yaml[key]), f"'{key}' is a factor such as 0.33, not {quote(model_yaml[key])}")
    _check_scales(model_yaml)
    shape = model_yaml.get("kpt_shape")
    if shape is not None:
        pair = isinstance(shape, (list, tuple)) and len(shape) == 2 and all(map(_is_count, shape))
        _require(pair, f"'kpt_shape' is [keypoints, 2 or 3], not {quote(shape)}")
    rows = [(part, number, row) for part in _PARTS for number, row in enumerate(model_yaml[part])]
    for part in _PARTS:
        _require(bool(model_yaml[part]), f"'{part}' has no row")
    _require(len(rows) <= _MAX_ROWS, f"it has {len(rows)} rows: {_MAX_ROWS} are the most")
    for index, (part, number, row) in enumerate(rows):
        _check_row(row, index, f"row {number} of '{part}'")
    _check_repeats(rows, _get_depth_multiple(model_yaml))
    _require(shape is not None or "Pose" not in rows[-1][2][2], "it has no 'kpt_shape', such as [17, 3]")


def _check_scales(model_yaml: Mapping[str, Any]) -> None:
    """Check `scales` and `scale` of a model YAML."""
    scales, scale = model_yaml.get("scales"), model_yaml.get("scale")
    if scales is None or scales == {}:
        return
    _require(isinstance(scales, Mapping), f"'scales' maps letters to [depth, width, channels], not {quote(scales)}")
    for letter, triple in scales.items():
        right = isinstance(triple, (list, tuple)) and len(triple) == 3 and all(map(_is_factor, triple))
        _require(right, f"'scales: {letter}' is [depth, width, most channels], not {quote(triple)}")
    known = ", ".join(map(str, scales))
    _require(not scale or scale in scales, f"it has no scale {quote(scale)} among its 'scales': {known}")


def _check_row(row: Any, index: int, where: str) -> None:
    """Check the types and ranges of one row."""
    source, repeats, module, args = row
    sources = source if isinstance(source, (list, tuple)) else [source]
    whole = bool(sources) and all(isinstance(one, int) and not isinstance(one, bool) for one in sources)
    _require(whole, f"{where} takes its input from layer numbers such as -1 or [4, 6], not from {quote(source)}")
    for one in sources:
        there = -index <= one < index if index else one == -1
        _require(there, f"{where} takes its input from layer {quote(one)}, but there are {index} layers before it")
    right = isinstance(repeats, int) and not isinstance(repeats, bool) and 1 <= repeats <= _MAX_REPEATS
    _require(right, f"{where} repeats its module 1 to {_MAX_REPEATS} times, not {quote(repeats)}")
    _require(isinstance(module, str) and bool(module), f"{where} names a module such as Conv, not {quote(module)}")
    _require(isinstance(args, (list, tuple)), f"{where} has a list of arguments such as [64, 3, 2], not {quote(args)}")
    for count, (value, depth) in enumerate(_iterate_leaves(args, 0)):
        _require(count < _MAX_VALUES and depth <= _MAX_DEPTH, f"{where} has arguments nested or repeated without end")
        plain = value is None or isinstance(value, (int, float, str, bool))
        _require(plain, f"{where} has an argument that is neither text, a number, true, false nor null: {quote(value)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(
            not number or abs(value) <= _MAX_NUMBER or abs(value) == math.inf,
            f"{where} has an argument out of range, {quote(value)}",
        )


def _get_depth_multiple(model_yaml: Mapping[str, Any]) -> float:
    """Return the factor on the repeats of rows, from `scales` or else `depth_multiple`, as `parse_model` does."""
    if scales := model_yaml.get("scales"):
        return float(scales[model_yaml.get("scale") or next(iter(scales))][0])
    return float(model_yaml.get("depth_multiple", 1.0))


def _check_repeats(rows: Sequence[tuple[str, int, Any]], depth: float) -> None:
    """Check the total number of repeated modules, since a network with too many cannot be built in finite time."""
    count = sum(max(repeats * depth, 1.0) if repeats > 1 else 1 for _, _, (_, repeats, *_) in rows)
    _require(
        count <= _MAX_REPEATS,
        f"its rows repeat their modules {count:,.0f} times, with a depth of {depth:g}: {_MAX_REPEATS} are the most",
    )


def _iterate_leaves(value: Any, depth: int) -> Iterator[tuple[Any, int]]:
    """Yield (value, depth) for each plain value in nested lists and mappings; too deep containers are yielded whole."""
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)) and depth <= _MAX_DEPTH:
        for item in value:
            yield from _iterate_leaves(item, depth + 1)
    else:
        yield value, depth


def _is_count(value: Any) -> bool:
    """Return whether a value is an integer from 1 to the largest number allowed."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_NUMBER


def _is_factor(value: Any) -> bool:
    """Return whether a value is a positive number."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (0 < value <= _MAX_NUMBER or value == math.inf)
    )


def _require(right: bool, what: str) -> None:
    """Raise SpecError with a message about the model YAML if a condition is False."""
    if not right:
        raise SpecError(f"the model YAML is wrong: {what}")


def check_modules(model_yaml: Mapping[str, Any], namespace: Mapping[str, Any]) -> None:
    """Check that every row of a model YAML names a layer.

    Args:
        model_yaml: A model YAML with four items per row.
        namespace: The globals of `ultralytics.nn.tasks`, including layers that users have added.

    Raises:
        SpecError: A name is unknown, or is not a subclass of `torch.nn.Module` that can be a layer.
    """
    from torch import nn

    for part in _PARTS:
        for number, (_, _, name, _) in enumerate(model_yaml[part]):
            found = find_module(name, namespace)
            where = f"row {number} of '{part}' in the model YAML"
            if found is None:
                layers = [key for key, value in namespace.items() if isinstance(value, type)]
                raise SpecError(f"{where} names {quote(name)}, which is not a module{suggest(name, layers)}")
            if not (isinstance(found, type) and issubclass(found, nn.Module)):
                raise SpecError(f"{where} names {quote(name)}, which is not a layer (a subclass of torch.nn.Module)")
            if issubclass(found, namespace["BaseModel"]):
                raise SpecError(f"{where} names {quote(name)}, which is a whole model, not a layer")


def find_module(name: str, namespace: Mapping[str, Any]) -> Any:
    """Return the object that `parse_model` would use for the module name of a row, or None if there is none."""
    if match := re.fullmatch(r"nn\.([A-Za-z_]\w*)", name):
        from torch import nn

        return getattr(nn, match[1], None)
    if match := re.fullmatch(r"torchvision\.ops\.([A-Za-z_]\w*)", name):
        import torchvision

        return getattr(torchvision.ops, match[1], None)
    return namespace.get(name) if name.isidentifier() else None


def explain_build_error(error: BaseException, model_yaml: Mapping[str, Any], builder: Any) -> SpecError | None:
    """Return an error that names the row whose layer could not be built, or None for an error from other code.

    Args:
        error: The exception, one of `BUILD_ERRORS`.
        model_yaml: The model YAML, with four items per row.
        builder: The function that iterates over the rows, with their index in its variable `i`.
    """
    if not raising_module(error).startswith(_BUILDERS):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    index = next((frame.f_locals.get("i") for frame in frames if frame.f_code is builder.__code__), None)
    return _make_row_error(index, model_yaml, error)


def explain_forward_error(error: BaseException, model_yaml: Mapping[str, Any]) -> SpecError | None:
    """Return an error that names the layer whose forward failed, or None for an error from other code.

    Args:
        error: The exception, one of `BUILD_ERRORS`.
        model_yaml: The model YAML, with four items per row.
    """
    if not raising_module(error).startswith(_BUILDERS):
        return None
    found: Any = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("m")
        if frame.f_code.co_name in ("_predict_once", "predict") and hasattr(layer, "i"):
            found = layer
    if found is None:
        return None
    return _make_row_error(found.i, model_yaml, error)


def _make_row_error(index: Any, model_yaml: Mapping[str, Any], error: BaseException) -> SpecError:
    """Return an error that names a row of the model YAML and quotes an exception."""
    rows = [(part, number, row[2]) for part in _PARTS for number, row in enumerate(model_yaml[part])]
    if not isinstance(index, int) or not 0 <= index < len(rows):
        return SpecError(f"the model YAML cannot be built: {type(error).__name__}: {reason(error)}")
    part, number, name = rows[index]
    return SpecError(
        f"row {number} of '{part}' in the model YAML (layer {index}, {name}) cannot be built: "
        f"{type(error).__name__}: {reason(error)}"
    )


def remove_pretrained_weights(
    model_yaml: Mapping[str, Any], namespace: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return a model YAML whose rows download no weights, and descriptions of the rows that were changed.

    The arguments of `TorchVision` are [channels, model, weights="DEFAULT", …].
    """
    changed = dict(model_yaml)
    fetched = []
    for part in _PARTS:
        rows = []
        for number, (source, repeats, name, args) in enumerate(model_yaml[part]):
            named = find_module(name, namespace)
            if named is not None and named is namespace.get("TorchVision") and _has_pretrained_weights(args):
                fetched.append(f"row {number} of '{part}' ({name} {args[1] if len(args) > 1 else ''})")
                args = [*args[:2], None, *args[3:]]
            rows.append([source, repeats, name, args])
        changed[part] = rows
    return changed, fetched


def _has_pretrained_weights(args: list[Any]) -> bool:
    """Return whether the arguments of a `TorchVision` row ask for weights."""
    return len(args) < 3 or args[2] not in (None, "None", False, "False", "")


def can_be_head(module: nn.Module) -> bool:
    """Return whether a module can be the last layer of a trained model: a head of Ultralytics or a user's class."""
    name = type(module).__module__
    return not name.startswith(("torch.", "ultralytics.")) or name == "ultralytics.nn.modules.head"
