"""What a trainer of Ultralytics trains, and whether that training is ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtdetr_act.surgery.model_plan import read_plan

if TYPE_CHECKING:
    from torch import nn


def started_here(trainer: Any) -> None:
    """Do nothing: a trainer that has this callback was started by a command of ours, be its model patched or not."""


def is_managed(trainer: Any) -> bool:
    """Return whether a training is of a patched model or of a command of ours; all others stay as they are."""
    started = started_here in trainer.callbacks.get("on_pretrain_routine_start", ())
    return started or bool(read_plan(task_model(trainer.model)))


def task_model(model: Any) -> nn.Module:
    """Return the task model inside the wrappers of several GPUs and of the compiler."""
    inner = getattr(model, "module", model)
    found: nn.Module = getattr(inner, "_orig_mod", inner)
    return found
