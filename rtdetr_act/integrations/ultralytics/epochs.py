"""What follows the epoch of an Ultralytics training: temperatures, and the fit at its start."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from ultralytics.utils import RANK

from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.integrations.ultralytics.trainers import task_model
from rtdetr_act.surgery.calibrate import calibrate, has_batch_norms
from rtdetr_act.surgery.epochs import find_scheduled_modules, set_epoch
from rtdetr_act.surgery.model_plan import mark_fitted, read_plan
from rtdetr_act.surgery.patcher import patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.refit import refit
from rtdetr_act.surgery.sites import iterate_placed_activations

_SCHEDULE = "activation_schedule"  # where a trainer keeps its `_Schedule`


@dataclass
class _Schedule:
    """What follows the epoch in one training."""

    batch: int = 0  # of the epoch
    modules: list[Scheduled] = field(default_factory=list)  # of the model and its average
    next_end: float = 0.0  # epoch at which the next of its schedules is over


def update_schedule(trainer: Any, event: str) -> None:
    """Keep the temperatures of the model and of its average at the epoch that a trainer is in.

    Called with each event of an Ultralytics trainer, before its callbacks, on every worker. Nothing is stored but in
    the model's plan: the epoch says the rest, so that a training that goes on needs no state of its own.
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
        # Where the loss is not finite, Ultralytics goes back to the checkpoint before and repeats the epoch.
        _set_epoch(trainer, trainer.epoch + 1)


_CALIBRATION_IMAGES = 128  # images for BatchNorm statistics


_REFIT_PIXELS = 128 * 320 * 320  # pixels for new weights, which pass at once


_MAX_FRACTION = 1 - 1e-6  # an epoch that is repeated after running out of memory counts on, but never into the next


def _start(trainer: Any) -> None:
    model = task_model(trainer.model)
    plan = read_plan(model)
    if plan.needs_fit:
        _refit(trainer, model, plan)
        for network in (model, trainer.ema.ema) if trainer.ema else (model,):
            mark_fitted(network)
    if not plan.schedule_ends():
        return
    if hasattr(model, "student_model"):
        raise InputError(
            "distill_model wraps the model, out of reach of temperatures: leave it out, or give tau_start=None"
        )
    setattr(trainer, _SCHEDULE, _Schedule())
    _set_epoch(trainer, trainer.start_epoch)


def _refit(trainer: Any, model: nn.Module, plan: Plan) -> None:
    """Give a network that was swapped the weights closest to what it was, in the averaged model too."""
    original = copy.deepcopy(model)
    unpatch_model(original)
    if plan.base:
        patch_model(original, plan.base)
    if any([*module.parameters()] for _, module in iterate_placed_activations(original)):
        # What these had learned is not in the new network, which is built from a YAML and a state dict.
        _calibrate(trainer, model)
        log("convolutions not fitted, since the activations before the swap learned: BatchNorm statistics only")
        return
    if RANK in (-1, 0):
        images = _collect_images(trainer, max(_REFIT_PIXELS // trainer.args.imgsz**2, 1))
        count = refit(model, images, original)
        log(f"{count} convolutions fitted to what they gave before the swap, on {len(images)} training images")
    state = model.state_dict()
    if RANK != -1:
        for tensor in state.values():
            torch.distributed.broadcast(tensor, 0)
    if trainer.ema:
        trainer.ema.ema.load_state_dict(state)


def _calibrate(trainer: Any, model: nn.Module) -> None:
    """Give the layers behind new activations the statistics of what these let through, in the averaged model too."""
    if not has_batch_norms(model):
        return
    images = _collect_images(trainer, _CALIBRATION_IMAGES)
    for network in (model, trainer.ema.ema) if trainer.ema else (model,):
        calibrate(network, images.split(16))


def _collect_images(trainer: Any, count: int) -> torch.Tensor:
    """Return images that a trainer trains on, as many as that or all, of one shape: (B, C, H, W) in 0..1."""
    images = pick_images(trainer.train_loader.dataset, min(count, _CALIBRATION_IMAGES))
    [(shape, _)] = Counter(image.shape for image in images).most_common(1)  # with rect=True each batch has its own
    chosen = (image for image in images if image.shape == shape)
    return torch.stack([image.float() / 255 if image.dtype == torch.uint8 else image for image in chosen])


def _set_epoch(trainer: Any, epoch: float) -> None:
    """Bring the model of a trainer and its average to an epoch, and let go of what is over by then."""
    schedule = getattr(trainer, _SCHEDULE)
    model = task_model(trainer.model)
    # Before every batch, the modules at hand: looking for them and for what is over takes 11 ms with rtdetr-l.
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
    networks = (task_model(trainer.model), *([trainer.ema.ema] if trainer.ema else []))
    return [module for network in networks for module in find_scheduled_modules(network)]
