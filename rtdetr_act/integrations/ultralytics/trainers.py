"""Find the task model of an Ultralytics trainer, and whether this package manages the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtdetr_act.surgery.model_plan import read_plan

if TYPE_CHECKING:
    from torch import nn


def started_here(trainer: Any) -> None:
    """Do nothing; this callback marks a trainer as started by a command of this package."""


def is_managed(trainer: Any) -> bool:
    """Return whether a training is of a patched model or started by a command of this package."""
    started = started_here in trainer.callbacks.get("on_pretrain_routine_start", ())
    return started or bool(read_plan(task_model(trainer.model)))


def task_model(model: Any) -> nn.Module:
    """Return the task model inside the wrappers of DDP and `torch.compile`."""
    inner = getattr(model, "module", model)
    found: nn.Module = getattr(inner, "_orig_mod", inner)
    return found
