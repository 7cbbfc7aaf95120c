"""Data sets by name, found, generated or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.utils import ROOT

from rtdetr_act.errors import (
    InputError,
    RtdetrActError,
    quote,
    raising_module,
    reason,
    suggest,
)
from rtdetr_act.integrations.ultralytics.arguments import check_file_name
from rtdetr_act.integrations.ultralytics.failures import one_sentence
from rtdetr_act.integrations.ultralytics.model_yaml import BUILDING_ERRORS
from rtdetr_act.integrations.ultralytics.shapes import VERSION, shapes


def resolve_data(source: str) -> str:
    """Return what to give Ultralytics as `data`: a path for `shapes` (generated if need be) and for local files.

    Raises:
        InputError: There is no such data set.
    """
    check_file_name(source)
    if source in ("shapes", "shapes.yaml") and not Path(source).exists():
        return str(shapes())
    known = {file.name for file in (ROOT / "cfg" / "datasets").glob("*.yaml")}
    if Path(source).exists() or source in known or "://" in source:
        return source
    if Path(source).suffix in (".yaml", ".yml") or "/" in source:
        raise InputError(f"there is no data set {quote(source)}{suggest(Path(source).name, [*known, 'shapes'])}")
    return source  # a classification set such as imagenet10, which Ultralytics finds or downloads by name


def training_data(model: Any) -> str:
    """Return the data set that a checkpoint was trained with, as `resolve_data` does.

    Raises:
        InputError: The checkpoint does not tell, or the data set is no longer there. Ultralytics would take coco8 then.
    """
    data = ((model.ckpt or {}).get("train_args") or {}).get("data")
    if not isinstance(data, str) or not data:
        raise InputError("the checkpoint does not tell what it was trained with: name a data set with --data")
    if (Path(data).parent.name, Path(data).name) == (f"shapes-v{VERSION}", "shapes.yaml"):
        data = "shapes"  # of another machine, or of a cache that was cleared
    try:
        return resolve_data(data)
    except InputError:
        raise InputError(
            f"the data set that the checkpoint was trained with, {quote(data)}, is not here: name one with --data"
        ) from None


def check_data(data: str, task: str) -> dict[str, Any]:
    """Return what Ultralytics knows of a data set, paths of its images among it, downloading it where it can.

    Raises:
        InputError: Images are missing, or the YAML is wrong.
    """
    try:
        with one_sentence():
            return check_cls_dataset(data) if task == "classify" else check_det_dataset(data)
    except RtdetrActError as error:
        raise InputError(f"data set {quote(data)}: {error}") from error
    except BUILDING_ERRORS as error:  # a YAML with other contents raises whatever its use raised
        if raising_module(error).startswith("rtdetr_act."):
            raise
        why = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{quote(data)} is not a data set that Ultralytics can read ({why})") from error
