"""Update a patched model during Ultralytics' training: the fit at its start, and what changes with the epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from ultralytics.utils import RANK

from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.trainers import task_model
from rtdetr_act.integrations.ultralytics.warm_start import fit_to_reference
from rtdetr_act.surgery.epochs import find_scheduled_modules, set_epoch
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.reference import finish_fit

_SCHEDULE = "activation_schedule"  # where a trainer keeps its `_Schedule`


@dataclass
class _Schedule:
    """State of the schedules in one training."""

    batch: int = 0  # of the epoch
    modules: list[Scheduled] = field(default_factory=list)  # of the model and its average
    next_end: float = 0.0  # epoch at which the next schedule finishes


def update_schedule(trainer: Any, event: str) -> None:
    """Set the epoch of a trainer's model and of its EMA, and fit the model at the start if needed.

    It is called with each event of an Ultralytics trainer, before its callbacks, on every worker. What depends on the
    epoch needs nothing but the plan and the weights, so a resumed training needs no further state.

    Args:
        trainer: The trainer.
        event: Name of the event, such as "on_train_batch_start".
    """
    if event == "on_pretrain_routine_end":
        _start(trainer)
    schedule = vars(trainer).get(_SCHEDULE)
    if schedule is None:
        return
    if event == "on_train_epoch_start":
        schedule.batch = 0
        schedule.modules = _find_modules(trainer)  # a recovery between two epochs makes a new average
    elif event == "on_train_batch_start":
        _set_epoch(trainer, trainer.epoch + min(schedule.batch / len(trainer.train_loader), _MAX_FRACTION))
        schedule.batch += 1
    elif event == "on_train_epoch_end" and bool(torch.isfinite(trainer.loss).all()):
        # If the loss is not finite, Ultralytics restores the last checkpoint and repeats the epoch.
        _set_epoch(trainer, trainer.epoch + 1)


_MAX_FRACTION = 1 - 1e-6  # of an epoch: after an out-of-memory retry there are more batches than expected


def _start(trainer: Any) -> None:
    """Fit the model if its plan asks for it, and create the state of its schedules."""
    model = task_model(trainer.model)
    plan = read_plan(model)
    if plan.needs_fit:
        _fit(trainer, model)
    if not plan.schedule_ends():
        return
    if hasattr(model, "student_model"):
        raise InputError(
            "distill_model wraps the model, so that activations do not learn the epoch: omit it, or give "
            "tau_start=None or, for pwlu, realign_epoch=None"
        )
    setattr(trainer, _SCHEDULE, _Schedule())
    _set_epoch(trainer, trainer.start_epoch)


def _fit(trainer: Any, model: nn.Module) -> None:
    """Fit a swapped network to the network before the swap, and copy the result to the other workers and the EMA."""
    if RANK in (-1, 0):
        fit_to_reference(model, trainer.train_loader.dataset)
    state = model.state_dict()
    if RANK != -1:
        for tensor in state.values():
            torch.distributed.broadcast(tensor, 0)
    if trainer.ema:
        trainer.ema.ema.load_state_dict(state)
    for network in (model, trainer.ema.ema) if trainer.ema else (model,):
        finish_fit(network)


def _set_epoch(trainer: Any, epoch: float) -> None:
    """Set the epoch of a trainer's model and of its EMA, and remove schedules that have finished."""
    schedule = getattr(trainer, _SCHEDULE)
    model = task_model(trainer.model)
    # Called before every batch, so the modules are cached: finding them and finished schedules takes 11 ms on rtdetr-l.
    if epoch < schedule.next_end:
        for module in schedule.modules:
            module.set_epoch(epoch)
    else:
        set_epoch(model, epoch)
        if trainer.ema:
            set_epoch(trainer.ema.ema, epoch)
        schedule.next_end = min(read_plan(model).schedule_ends(), default=math.inf)
        schedule.modules = _find_modules(trainer)
    if schedule.next_end == math.inf:
        delattr(trainer, _SCHEDULE)


def _find_modules(trainer: Any) -> list[Scheduled]:
    """Return the modules of a trainer's model and of its EMA whose state depends on the epoch."""
    networks = (task_model(trainer.model), *([trainer.ema.ema] if trainer.ema else []))
    return [module for network in networks for module in find_scheduled_modules(network)]
