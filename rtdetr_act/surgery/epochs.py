"""Anneal the temperatures of a model, and realign its piecewise linear units, with the training epoch."""

from __future__ import annotations

from typing import Any

from torch import nn

from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.surgery.model_plan import read_plan, set_plan
from rtdetr_act.surgery.modules import unwrap


def set_epoch(model: Any, epoch: float) -> None:
    """Set what depends on the training epoch: temperatures of attentions, and once the regions of PWLUs.

    Ultralytics' training calls it before every batch. In a custom training loop, call it at least once per epoch, and
    preferably before every step. Schedules that have finished are also removed from `model.yaml`.

    Args:
        model: A model as accepted by `patch_model`.
        epoch: Epochs since the first step, fractional within an epoch: 0.5 in the middle of the first one.

    Raises:
        ModelError: The model is exported, wrapped or compiled.

    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> _ = patch_model(net, "dyrelu_c(tau=1.0, tau_start=30.0, tau_epochs=10)")
    >>> set_epoch(net, 5)
    >>> net[1].temperature()
    tensor(15.5000)
    """
    root = unwrap(model)
    for module in find_scheduled_modules(root):
        module.set_epoch(epoch)
    plan = read_plan(root)
    if (remaining := plan.without_finished_schedules(epoch)) != plan:
        set_plan(root, remaining)


def find_scheduled_modules(model: nn.Module) -> list[Scheduled]:
    """Return the modules of a model whose state depends on the epoch."""
    return [module for module in model.modules() if isinstance(module, Scheduled)]
