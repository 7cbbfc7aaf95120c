"""Hook the modules of a checkout when a script imports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import wrapt

from rtdetr_act.integrations.yolov5.building import ModelBuilder
from rtdetr_act.integrations.yolov5.checkout import check_builder, lies_in
from rtdetr_act.integrations.yolov5.training import TrainingWatch, hook_loggers
from rtdetr_act.surgery.plan import Plan


@contextmanager
def hooked_checkout(checkout: Path, added: Plan, watch: TrainingWatch) -> Iterator[None]:
    """Hook what the code inside the block imports from a checkout of YOLOv5 or YOLOv7.

    Args:
        checkout: The folder of the checkout.
        added: A resolved plan for every model that is built; empty for the plans of the YAMLs alone.
        watch: Gets the models, and observes their training.

    Raises:
        ModelError: The module `models.yolo` is not that of YOLOv5 or YOLOv7; raised where it is imported.
    """

    def hook_yolo(module: ModuleType) -> None:
        check_builder(module, checkout)
        ModelBuilder(module, added, watch.add)

    with ExitStack() as stack:
        stack.enter_context(watch.watch())
        stack.enter_context(_on_import("models.yolo", hook_yolo))
        for name, hook in (("utils.torch_utils", watch.hook_average), ("utils.loggers", hook_loggers)):
            stack.enter_context(_on_import(name, hook, checkout))
        yield


@contextmanager
def _on_import(name: str, hook: Callable[[ModuleType], None], folder: Path | None = None) -> Iterator[None]:
    """Call a function with a module of a name that is imported inside the block, from a folder if one is given."""
    active = True

    def call(module: ModuleType) -> None:
        if active and (folder is None or lies_in(module, folder)):
            hook(module)

    wrapt.register_post_import_hook(call, name)  # there is no way to take it back
    try:
        yield
    finally:
        active = False
