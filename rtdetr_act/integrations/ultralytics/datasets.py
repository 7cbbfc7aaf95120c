"""Find data sets by name, and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_cls_dataset, check_det_dataset
from ultralytics.utils import ROOT

from rtdetr_act.errors import InputError, RtdetrActError, quote, raising_module, reason, suggest
from rtdetr_act.integrations.ultralytics.arguments import check_file_name
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.model_yaml import BUILD_ERRORS
from rtdetr_act.integrations.ultralytics.shapes import VERSION, shapes


def resolve_data(source: str | Path) -> str:
    """Return Ultralytics' `data` argument for a data set.

    Args:
        source: "shapes" for the embedded one, which is generated if need be; a path or URL of a YAML; a name of one of
            Ultralytics' own, such as "coco8.yaml"; for classification a folder or a name such as "imagenet10".

    Raises:
        InputError: The data set does not exist, or "shapes" cannot be written.
    """
    source = str(source)
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
    """Return the data set that a checkpoint was trained on, as `resolve_data` does.

    Args:
        model: RTDETR or YOLO object, loaded from the checkpoint.

    Raises:
        InputError: The checkpoint does not name a data set, or it no longer exists. Ultralytics itself would validate
            on coco8 then.
    """
    data = ((model.ckpt or {}).get("train_args") or {}).get("data")
    if not isinstance(data, str) or not data:
        raise InputError("the checkpoint does not tell what it was trained on: name a data set with data=")
    if (Path(data).parent.name, Path(data).name) == (f"shapes-v{VERSION}", "shapes.yaml"):
        data = "shapes"  # its path is that of another machine, or of a cache that was cleared
    try:
        return resolve_data(data)
    except InputError:
        raise InputError(
            f"the data set that the checkpoint was trained on, {quote(data)}, is not here: name one with data="
        ) from None


def check_data(data: str, task: str) -> dict[str, Any]:
    """Check a data set with Ultralytics, which downloads it if it can.

    Args:
        data: Ultralytics' `data` argument, as `resolve_data` returns it.
        task: Ultralytics' task, such as "detect".

    Returns:
        Ultralytics' dictionary of the data set: paths of the splits, number of classes `nc`, `names` and so on.

    Raises:
        InputError: Images are missing, or the YAML is wrong.
    """
    try:
        with translate_errors():
            return check_cls_dataset(data) if task == "classify" else check_det_dataset(data)
    except RtdetrActError as error:
        raise InputError(f"data set {quote(data)}: {error}") from error
    except BUILD_ERRORS as error:  # Ultralytics does not validate a YAML before it uses its values
        if raising_module(error).startswith("rtdetr_act."):
            raise
        problem = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{quote(data)} is not a data set that Ultralytics can read ({problem})") from error
