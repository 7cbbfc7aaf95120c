"""Find the checkout that a script belongs to, and check that it is one of YOLOv5 or YOLOv7."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

from rtdetr_act.errors import InputError, ModelError, quote

_BUILDER = Path("models", "yolo.py")


def find_checkout(script: str | Path) -> Path:
    """Return the folder of the checkout that a script belongs to: the nearest one that has a `models/yolo.py`.

    Raises:
        InputError: There is no such script, or no such folder above it.
    """
    path = Path(script)
    if not path.is_file():
        raise InputError(f"there is no script {quote(str(script))}")
    for folder in path.resolve().parents:
        if (folder / _BUILDER).is_file():
            return folder
    raise InputError(
        f"{quote(str(script))} is not a YOLOv5 or YOLOv7 script: neither its folder nor one above it has a "
        f"{_BUILDER.as_posix()}"
    )


def lies_in(module: ModuleType, checkout: Path) -> bool:
    """Return whether the file of a module lies in a checkout."""
    return module.__file__ is not None and Path(module.__file__).resolve().is_relative_to(checkout)


def check_builder(module: ModuleType, checkout: Path) -> None:
    """Check that `models.yolo` builds models as YOLOv5 and YOLOv7 do: from `Model`, by `parse_model(d, ch)`.

    Args:
        module: The module `models.yolo` that the script has imported.
        checkout: The checkout of the script.

    Raises:
        ModelError: It is another module.
    """
    if not lies_in(module, checkout):
        raise ModelError(
            f"the script of {checkout} imports 'models.yolo' from {module.__file__}: another folder named 'models' "
            "comes first on the path"
        )
    parse, model = getattr(module, "parse_model", None), getattr(module, "Model", None)
    takes_yaml = inspect.isfunction(parse) and list(inspect.signature(parse).parameters)[:2] == ["d", "ch"]
    if not (takes_yaml and inspect.isclass(model)):
        raise ModelError(
            f"{module.__file__} is not that of YOLOv5 or YOLOv7: it has no class 'Model', or no function "
            "'parse_model(d, ch)'"
        )
