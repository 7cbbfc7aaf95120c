"""Tell a model how long it has been trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.surgery.model_plan import read_plan, set_plan
from rtdetr_act.surgery.modules import unwrap


def set_epoch(model: Any, epoch: float) -> None:
    """Tell a model how long it has been trained, so that the temperatures of its attentions follow.

    Ultralytics' training does this by itself, before every batch. In a training loop of your own, call it at least
    once an epoch, better before every step; a schedule that is over leaves `model.yaml` too.

    Args:
        model: A model as `patch_model` takes it.
        epoch: Epochs since the first step, in parts where it is called more often: 0.5 in the middle of the first.

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
    for module in scheduled_modules(root):
        module.set_epoch(epoch)
    plan = read_plan(root)
    if (settled := plan.settled(epoch)) != plan:
        set_plan(root, settled)


def scheduled_modules(model: nn.Module) -> list[Scheduled]:
    """Return the modules of a model that follow the epoch."""
    return [module for module in model.modules() if isinstance(module, Scheduled)]
