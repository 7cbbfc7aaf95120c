"""Tell the learning-rate schedulers of an optimizer about a new parameter group."""

from __future__ import annotations

import gc
import re
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rtdetr_act.errors import ModelError

# What torch's schedulers hold for each group, beside what they write into the group itself (OneCycleLR).
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "swa_lrs")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")
_NAMES = re.compile(r"schedul|warm_?up|LR$", re.IGNORECASE)  # of classes that may be schedulers


def find_schedulers(optimizer: Optimizer) -> list[LRScheduler]:
    """Return the learning-rate schedulers that exist for an optimizer, those inside others included.

    An optimizer does not know its schedulers, so they are looked for among all objects of the process, which takes 0.1
    to 0.2 s for the half million of a process with torch and Ultralytics.

    Args:
        optimizer: The optimizer.

    Raises:
        ModelError: A scheduler holds a value for each group in an attribute that torch's own do not have, so that it
            cannot learn of a new group; or there is one, but `gc.freeze` hides it.
    """
    may_schedule: dict[type, bool] = {}
    candidates = []
    for each in gc.get_objects():
        cls = type(each)
        if cls not in may_schedule:
            may_schedule[cls] = issubclass(cls, LRScheduler) or _NAMES.search(cls.__name__) is not None
        if may_schedule[cls] and isinstance(getattr(each, "__dict__", None), dict):
            candidates.append(each)
    own = _get_innermost(optimizer)
    found = [
        each
        for each in candidates
        if isinstance(each, LRScheduler) and _get_innermost(vars(each).get("optimizer")) is own
    ]
    if not found and hasattr(optimizer.step, "_wrapped_by_lr_sched") and gc.get_freeze_count():
        raise ModelError("the schedulers of the optimizer cannot be found after gc.freeze(): call gc.unfreeze() before")
    for each in candidates:
        held = list(vars(each).values())
        if any(value is optimizer or value is own or any(value is other for other in found) for value in held):
            _check_extendable(each, len(optimizer.param_groups))
    return found


def _get_innermost(optimizer: Any) -> Any:
    """Return the optimizer inside those that wrap another one, as accelerate's does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _check_extendable(scheduler: Any, groups: int) -> None:
    """Raise ModelError if a scheduler holds a value for each group in an attribute of its own."""
    for name, value in vars(scheduler).items():
        known = isinstance(scheduler, LRScheduler) and name in (*_RATES, *_OTHERS)
        if known or not isinstance(value, (list, tuple)) or len(value) != groups:
            continue
        # Rates are floats; integers are milestones.
        if all(isinstance(item, (float, Tensor)) or (callable(item) and not _is_scheduler(item)) for item in value):
            raise ModelError(
                f"{type(scheduler).__name__} holds one value for each parameter group in '{name}', and cannot learn of "
                "a new group: call add_to_optimizer before the scheduler is built"
            )


def _is_scheduler(item: object) -> bool:
    return isinstance(item, LRScheduler)


def let_group_follow(scheduler: LRScheduler, index: int, reference: int, factor: float) -> None:
    """Let a scheduler change the learning rate of a group as that of another group, times a factor.

    Args:
        scheduler: As returned by `find_schedulers`.
        index: Index of the group, which is new if it is the last one.
        reference: Index of the other group.
        factor: The factor.
    """
    for name in (*_RATES, *_OTHERS):
        values = vars(scheduler).get(name)
        if not isinstance(values, list) or reference >= len(values):
            continue
        value = values[reference]
        if name in _RATES:
            value = value * factor
        # A new list, since SequentialLR of torch 2.4 shares `_last_lr` with the scheduler that runs.
        setattr(scheduler, name, [*values[:index], value, *values[index + 1 :]])
