"""Whether checkpoints can be validated under the same settings, so that their scores compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdetr_act.errors import InputError, ModelError
from rtdetr_act.integrations.ultralytics.datasets import training_data
from rtdetr_act.integrations.ultralytics.images import training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_checkpoint

DEFAULT_IMGSZ = 640  # where the checkpoint does not tell
_TRAINED_ON = "were trained on different data"


@dataclass(frozen=True)
class _Settings:
    """What a checkpoint says of the validation that its training ended with."""

    task: str
    imgsz: int
    single_cls: bool
    data: str  # as the training named it, "" if it did not


def check_comparable(
    paths: Mapping[str, str], settings: Mapping[str, Any], warn: Callable[[str], object]
) -> dict[str, str]:
    """Check that checkpoints are validated alike; return why some cannot be validated, by name.

    Args:
        paths: The checkpoints by name.
        settings: The arguments for all of them, which may have "data" and "imgsz".
        warn: Called with a warning, if the data of the validation is not that of all trainings.

    Raises:
        InputError: A file does not exist, or tasks, data sets or image sizes differ.
    """
    read: dict[str, _Settings] = {}
    failures: dict[str, str] = {}
    for name, path in paths.items():
        try:
            model = load_checkpoint(path)
        except ModelError as error:  # a wrong name is not one of them: it is reported before minutes of validating
            failures[name] = str(error)
            continue
        try:
            read[name] = _read_settings(model, find_data="data" not in settings)
        except InputError as error:
            failures[name] = str(error)
    _check_equal({name: each.task for name, each in read.items()}, "are of different tasks", "validate them apart")
    if "data" not in settings:
        _check_equal({name: each.data for name, each in read.items()}, _TRAINED_ON, "name one for all with data=")
    elif len({Path(each.data).name for each in read.values()}) > 1:
        groups = _group({name: Path(each.data).name or "unknown data" for name, each in read.items()})
        warn(f"the checkpoints {_TRAINED_ON} ({groups}), so that their scores do not compare their networks alone")
    if "imgsz" not in settings:
        sizes = {name: str(each.imgsz) for name, each in read.items()}
        _check_equal(sizes, "were trained with images of different sizes", "name one for all with imgsz=")
    if "single_cls" not in settings:
        kinds = {name: str(each.single_cls) for name, each in read.items()}
        _check_equal(kinds, "were trained with and without single_cls", "name one for all with single_cls=")
    return failures


def _check_equal(values: Mapping[str, str], problem: str, remedy: str) -> None:
    if len(set(values.values())) > 1:
        raise InputError(f"the checkpoints {problem} ({_group(values)}): {remedy}")


def _group(values: Mapping[str, str]) -> str:
    """Return which names have which value.

    >>> _group({"a": "640", "b": "320", "c": "640"})
    '640: a, c; 320: b'
    """
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())


def _read_settings(model: Any, *, find_data: bool) -> _Settings:
    """Return what a checkpoint says of its training.

    Args:
        model: RTDETR or YOLO object.
        find_data: Whether its data set must be here, since it is validated on that.
    """
    arguments = (model.ckpt or {}).get("train_args") or {}
    data = training_data(model) if find_data else str(arguments.get("data") or "")
    # The same data set by another path, as long as it is here.
    data = str(Path(data).resolve()) if find_data and Path(data).exists() else data
    return _Settings(
        str(model.task), training_imgsz(model, DEFAULT_IMGSZ), bool(model.overrides.get("single_cls")), data
    )
