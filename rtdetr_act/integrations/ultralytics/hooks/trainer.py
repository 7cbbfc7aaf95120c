"""ultralytics.engine.trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtdetr_act.files import partial_path, remove_leftovers
from rtdetr_act.integrations.ultralytics.hooks.replacing import replace, replaced
from rtdetr_act.integrations.ultralytics.log import edited_log, log
from rtdetr_act.integrations.ultralytics.trainers import is_managed, task_model
from rtdetr_act.surgery.model_plan import read_plan


def hook_trainer(trainer: Any) -> None:
    """Hook `ultralytics.engine.trainer`."""
    # Ultralytics applies weight decay to every parameter without "bias" in its name outside *Norm* modules, including
    # the slopes of PReLU.
    replace(trainer.BaseTrainer, "build_optimizer", _build_optimizer)
    # Temperatures are updated on every worker, while in 8.3 user callbacks run on the first one only.
    replace(trainer.BaseTrainer, "run_callbacks", _run_callbacks)
    # Both overwrite the checkpoint in place: if the process is killed or the disk is full, last.pt is truncated and the
    # training is lost.
    replace(trainer.BaseTrainer, "save_model", _save_model)
    replace(trainer, "strip_optimizer", _strip_optimizer)
    # Trackers log trainer.metrics in callbacks that are added here; ours must run before and after them.
    replace(trainer.callbacks, "add_integration_callbacks", _add_integration_callbacks)
    # Tuning and training on several data sets run `python -m ultralytics…`, which does not import the plugin.
    if command := getattr(trainer, "_YOLO_CLI_COMMAND", None):
        replaced.append((trainer, "_YOLO_CLI_COMMAND", command))
        run = "import rtdetr_act; from ultralytics.cfg import entrypoint; entrypoint()"
        trainer._YOLO_CLI_COMMAND = [sys.executable, "-c", run]


def _build_optimizer(original: Callable[..., Any], self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `BaseTrainer.build_optimizer` to regroup the parameters of a patched model and report what has no effect."""
    optimizer = original(self, model, *args, **kwargs)
    plan = read_plan(task_model(model))
    if not plan:
        return optimizer
    if plan.memory == "low" and hasattr(getattr(model, "module", model), "_orig_mod"):
        log("memory=low has no effect on a compiled model (compile=True), whose compiler plans its memory", warn=True)
    from rtdetr_act.integrations.ultralytics.optimizer import (
        exclude_dynamic_kernels_from_muon,
        separate_activation_parameters,
    )

    exclude_dynamic_kernels_from_muon(optimizer, model)
    if count := separate_activation_parameters(optimizer, model, plan.act_lr):
        rate = "" if plan.act_lr == 1.0 else f", their learning rate times {plan.act_lr:g}"
        log(f"{count} scalar and per-channel activation parameters without weight decay{rate}")
    return optimizer


def _run_callbacks(original: Callable[..., Any], self: Any, event: str) -> Any:
    """Wrap `BaseTrainer.run_callbacks` to update temperatures before the callbacks of an event."""
    from rtdetr_act.integrations.ultralytics.epochs import update_schedule

    update_schedule(self, event)
    return original(self, event)


_whole: set[Path] = set()  # paths of checkpoints that are written atomically


def _save_model(original: Callable[..., Any], self: Any) -> Any:
    """Wrap `BaseTrainer.save_model` to write checkpoints atomically."""
    if not is_managed(self):
        return original(self)
    last, best = self.last, self.best
    _whole.update((Path(last), Path(best)))
    for path in (last, best):
        remove_leftovers(path)
    self.last, self.best = partial_path(last), partial_path(best)
    try:
        result = original(self)
        for written, path in ((self.best, best), (self.last, last)):
            if written.exists():
                written.replace(path)
        return result
    finally:
        self.last.unlink(missing_ok=True)
        self.best.unlink(missing_ok=True)
        self.last, self.best = last, best


def _strip_optimizer(original: Callable[..., Any], f: str | Path, s: str = "", *args: Any, **kwargs: Any) -> Any:
    """Wrap `strip_optimizer` to rewrite checkpoints atomically."""
    if s or Path(f) not in _whole:
        return original(f, s, *args, **kwargs)
    partial = partial_path(Path(f))
    try:
        with edited_log(lambda text: text.replace(f" saved as {partial},", "")):
            result = original(f, str(partial), *args, **kwargs)
        if partial.exists():
            partial.replace(f)
        return result
    finally:
        partial.unlink(missing_ok=True)


def _add_integration_callbacks(original: Callable[..., Any], instance: Any) -> None:
    """Wrap `add_integration_callbacks` to add the callbacks of this package to trainers."""
    from ultralytics.engine.trainer import BaseTrainer

    from rtdetr_act.integrations.ultralytics.tracking import add_callbacks

    original(instance)
    if isinstance(instance, BaseTrainer):  # validators, predictors and exporters come here too
        add_callbacks(instance)
        if instance.args.plots:
            from rtdetr_act.integrations.ultralytics.tracking_figure import add_figure_callback

            add_figure_callback(instance)
