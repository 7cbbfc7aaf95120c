"""Run a script of YOLOv5 or YOLOv7 with other activations."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.integrations.yolov5.building import refuse_convolutions
from rtdetr_act.integrations.yolov5.checkout import find_checkout
from rtdetr_act.integrations.yolov5.hooks import hooked_checkout
from rtdetr_act.integrations.yolov5.trained import Trained
from rtdetr_act.integrations.yolov5.training import TrainingWatch
from rtdetr_act.surgery.patcher import resolve_plan
from rtdetr_act.surgery.plan import Plan, SwapOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def run_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    activation: str | None = None,
    *,
    show: Callable[[Trained], object] | None = None,
    **options: Unpack[SwapOptions],
) -> Trained | None:
    """Run a script of a YOLOv5 or YOLOv7 checkout, such as its train.py, in this process with other activations.

    The script runs as `python script.py` runs it. Its models are built with the plan of their YAML, which is that of
    the checkpoint for `--weights` and `--resume`, and the parameters of their activations are put into its optimizer.
    The checkout is imported under the names `models` and `utils`, so that one process runs one script.

    Args:
        script: The script.
        arguments: Its own arguments, such as ["--img", "640", "--data", "coco128.yaml"].
        activation: A plan added to every model that is built, as `patch_model` takes it. Default: None, none.
        show: Called with what was trained, also where the script ends by `sys.exit(0)`.
        **options: `scope`, `act_lr`, `init`, `replaces` and `memory` of `patch_model`.

    Returns:
        What was trained; None if the script trained no patched model.

    Raises:
        InputError: There is no such script, it is not one of YOLOv5 or YOLOv7, or this process has run one already.
        SpecError: The activation is invalid.
        ModelError: The script ended well, but built no model for `activation`.
        SystemExit: The script ended by `sys.exit`.
    """
    checkout = find_checkout(script)
    if "models.yolo" in sys.modules:
        raise InputError("this process has run a script of YOLOv5 or YOLOv7 already: run the next one in a new process")
    plan = Plan(memory=options.get("memory")) if activation is None else Plan.parse(activation, **options)
    added = resolve_plan(plan)
    refuse_convolutions(added)
    watch = TrainingWatch()
    ended: SystemExit | None = None
    with hooked_checkout(checkout, added, watch):
        try:
            _run_as_main(script, arguments)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            ended = error
    trained = watch.summarise()
    if trained is not None and show is not None:
        show(trained)
    if added and not watch.built:
        raise ModelError(
            f"{quote(str(added))} was not used: {Path(script).name} built no model, and a checkpoint keeps the "
            "activations that it was trained with"
        )
    if ended is not None:
        raise ended
    return trained


def _run_as_main(script: str | Path, arguments: Sequence[str]) -> None:
    """Run a script as `python script.py arguments` does.

    `runpy.run_path` differs in `sys.argv[0]` or `__file__`, which are the path as given and the absolute one.
    """
    main = ModuleType("__main__")
    main.__file__ = str(Path(script).absolute())
    main.__dict__["__builtins__"] = builtins
    with io.open_code(main.__file__) as file:
        source = file.read()
    with _interpreter_state(main, [str(script), *arguments]):
        exec(compile(source, main.__file__, "exec"), main.__dict__)


@contextmanager
def _interpreter_state(main: ModuleType, argv: list[str]) -> Iterator[None]:
    """Set `__main__`, `sys.argv` and `sys.path[0]` to those of a script inside the block."""
    before = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"], sys.argv = main, argv
    if not getattr(sys.flags, "safe_path", False):  # python -P, where no folder is put on the path
        sys.path[:1] = [str(Path(argv[0]).resolve().parent)]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before
