"""What training a patched model needs beyond Ultralytics' own: optimizer groups, and what follows the epoch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rtdetr_act.convolutions.dynamic import DynamicConv2d
from rtdetr_act.errors import InputError
from rtdetr_act.images import pick_images
from rtdetr_act.patcher import mark_fitted, patch_model, unpatch_model
from rtdetr_act.plan import Plan
from rtdetr_act.schedules import Scheduled, scheduled_modules, set_epoch
from rtdetr_act.sites import placed_activations
from rtdetr_act.ultralytics_hooks import log, plan_of
from rtdetr_act.warmstart.calibrate import calibrate, has_norms
from rtdetr_act.warmstart.refit import refit

# These hold weights, not slopes: what Ultralytics does with them elsewhere is right for them here.
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def separate_activation_parameters(optimizer: Optimizer, model: nn.Module, act_lr: float = 1.0) -> int:
    """Take scalar and per-channel activation parameters out of weight decay (and out of Muon), in place.

    PReLU's documentation warns against decaying its slope: decay pulls it to zero whatever the loss says. With
    `act_lr=1` they join the group without decay that is there, so no group appears behind the back of a learning-rate
    scheduler; else they get one group with the learning rate of that group times `act_lr`, which is safe while no
    scheduler exists yet (Ultralytics builds it after the optimizer).

    Args:
        optimizer: As Ultralytics' `build_optimizer` returns it, before its first step.
        model: The patched model it was built for.
        act_lr: Factor on their learning rate.

    Returns:
        How many parameter tensors were moved.
    """
    chosen = {id(parameter) for parameter in slopes(model)}
    moved = _take_out(optimizer.param_groups, chosen)
    if not moved:
        return 0
    home = _find_group(optimizer.param_groups, _parameters_of(model, "weight", _NORMS), decays=False)
    if home is not None and act_lr == 1.0:
        home["params"].extend(moved)
    else:
        settings = _settings_of(home or optimizer.param_groups[-1])
        optimizer.add_param_group({**settings, "params": moved, "lr": settings["lr"] * act_lr, "weight_decay": 0.0})
    return len(moved)


def keep_stacks_out_of_muon(optimizer: Optimizer, model: nn.Module) -> int:
    """Take kernels and biases of dynamic convolutions, (K, Cout, …) and (K, Cout), out of Muon, in place.

    Muon is for matrices and the kernels of convolutions, which it flattens to matrices. Here it would make the K
    kernels of a layer orthogonal to one another, where it takes five axes at all: Ultralytics' did not before 8.4.130.
    They go where the weights and biases go that Muon does not take.

    Returns:
        How many parameter tensors were moved.
    """
    stacks = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
    groups = optimizer.param_groups
    muon = [group for group in groups if group.get("use_muon")]
    count = 0
    for name, decays in (("weight", True), ("bias", False)):
        chosen = {id(p) for module in stacks if (p := getattr(module, name)) is not None}
        if not (moved := _take_out(muon, chosen)):
            continue
        count += len(moved)
        if (home := _find_group(groups, _parameters_of(model, name, _WEIGHT_LAYERS), decays=decays)) is not None:
            home["params"].extend(moved)
        else:
            settings = _settings_of(muon[-1])
            decay = settings["weight_decay"] if decays else 0.0
            optimizer.add_param_group({**settings, "params": moved, "weight_decay": decay})
    return count


def _take_out(groups: list[dict], chosen: set[int]) -> list[nn.Parameter]:
    """Remove the parameters of these ids from optimizer groups, and return them."""
    moved = [p for group in groups for p in group["params"] if id(p) in chosen]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    return moved


def _find_group(groups: list[dict], alike: set[int], *, decays: bool) -> dict | None:
    """Return the group whose parameters are treated as some should be: with or without decay, never by Muon.

    Neither labels nor places tell: Ultralytics has no labels before 8.4.30, and the order of 8.4.0 is another. Of
    several groups that do the same, as those of MuSGD whose first has the head's threefold rate, the one is meant that
    holds parameters of the kind, with the lowest rate. Biases have a warm-up of their own, so that a group without
    decay that holds others will not do.

    Args:
        groups: Of the optimizer.
        alike: Ids of the model's parameters of the kind.
        decays: Whether the group has weight decay.
    """
    right = [group for group in groups if bool(group["weight_decay"]) == decays and not group.get("use_muon")]
    holding = [group for group in right if any(id(p) in alike for p in group["params"])]
    others = [group for group in right if decays or not group["params"]]
    return min(holding or others, key=lambda group: group["lr"], default=None)


def _settings_of(group: dict) -> dict[str, Any]:
    """Return the settings of a group for another one beside it, which Muon leaves alone."""
    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {**settings, "use_muon": False} if "use_muon" in settings else settings


def _parameters_of(model: nn.Module, name: str, classes: tuple[type, ...]) -> set[int]:
    """Return the ids of the parameters of that name in modules of these classes."""
    found = (getattr(module, name, None) for module in model.modules() if isinstance(module, classes))
    return {id(parameter) for parameter in found if isinstance(parameter, nn.Parameter)}


def slopes(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the scalar and per-channel parameters of the activations that a swap placed in a model."""
    for _, activation in placed_activations(model):
        for module in activation.modules():
            if isinstance(module, _WEIGHT_LAYERS):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.numel() == max(parameter.shape, default=1):  # one axis at most: (), (C,), (1, C, 1, 1)
                    yield parameter


# --- schedules: what follows the epoch of an Ultralytics training -----------------------------------------------------

_STATE = "activation_schedule"  # where a trainer keeps its `_Schedule`


@dataclass
class _Schedule:
    """What follows the epoch in one training."""

    batch: int = 0  # of the epoch
    modules: list[Scheduled] = field(default_factory=list)  # of the model and its average
    next_end: float = 0.0  # epoch at which the next of its schedules is over


def follow(trainer: Any, event: str) -> None:
    """Keep the temperatures of the model and of its average at the epoch that a trainer is in.

    Called with each event of an Ultralytics trainer, before its callbacks, on every worker. Nothing is stored but in
    the model's plan: the epoch says the rest, so that a training that goes on needs no state of its own.
    """
    if event == "on_pretrain_routine_end":
        _start(trainer)
    schedule = vars(trainer).get(_STATE)
    if schedule is None:
        return
    if event == "on_train_epoch_start":
        schedule.batch = 0
        schedule.modules = _scheduled(trainer)  # a recovery between two epochs makes a new average
    elif event == "on_train_batch_start":
        _advance(trainer, trainer.epoch + min(schedule.batch / len(trainer.train_loader), _BEFORE_END))
        schedule.batch += 1
    elif event == "on_train_epoch_end" and bool(torch.isfinite(trainer.loss).all()):
        # Where the loss is not finite, Ultralytics goes back to the checkpoint before and repeats the epoch.
        _advance(trainer, trainer.epoch + 1)


_CALIBRATING = 128  # images for BatchNorm statistics
_REFITTING = 128 * 320 * 320  # pixels for new weights, which pass at once
_BEFORE_END = 1 - 1e-6  # an epoch that is repeated after running out of memory counts on, but never into the next


def _start(trainer: Any) -> None:
    model = task_model(trainer.model)
    plan = plan_of(model)
    if plan.awaits_fit:
        _refit(trainer, model, plan)
        for network in (model, trainer.ema.ema) if trainer.ema else (model,):
            mark_fitted(network)
    if not plan.schedule_ends():
        return
    if hasattr(model, "student_model"):
        raise InputError(
            "distill_model wraps the model, out of reach of temperatures: leave it out, or give tau_start=None"
        )
    setattr(trainer, _STATE, _Schedule())
    _advance(trainer, trainer.start_epoch)


def _refit(trainer: Any, model: nn.Module, plan: Plan) -> None:
    """Give a network that was swapped the weights closest to what it was, in the averaged model too."""
    from ultralytics.utils import RANK

    original = copy.deepcopy(model)
    unpatch_model(original)
    if plan.base:
        patch_model(original, plan.base)
    if any([*module.parameters()] for _, module in placed_activations(original)):
        # What these had learned is not in the new network, which is built from a YAML and a state dict.
        _calibrate(trainer, model)
        log("convolutions not fitted, since the activations before the swap learned: BatchNorm statistics only")
        return
    if RANK in (-1, 0):
        images = _images(trainer, max(_REFITTING // trainer.args.imgsz**2, 1))
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
    if not has_norms(model):
        return
    images = _images(trainer, _CALIBRATING)
    for network in (model, trainer.ema.ema) if trainer.ema else (model,):
        calibrate(network, images.split(16))


def _images(trainer: Any, count: int) -> torch.Tensor:
    """Return images that a trainer trains on, as many as that or all, of one shape: (B, C, H, W) in 0..1."""
    images = pick_images(trainer.train_loader.dataset, min(count, _CALIBRATING))
    [(shape, _)] = Counter(image.shape for image in images).most_common(1)  # with rect=True each batch has its own
    chosen = (image for image in images if image.shape == shape)
    return torch.stack([image.float() / 255 if image.dtype == torch.uint8 else image for image in chosen])


def _advance(trainer: Any, epoch: float) -> None:
    """Bring the model of a trainer and its average to an epoch, and let go of what is over by then."""
    schedule = getattr(trainer, _STATE)
    model = task_model(trainer.model)
    # Before every batch, the modules at hand: looking for them and for what is over takes 11 ms with rtdetr-l.
    if epoch < schedule.next_end:
        for module in schedule.modules:
            module.set_epoch(epoch)
    else:
        set_epoch(model, epoch)
        if trainer.ema:
            set_epoch(trainer.ema.ema, epoch)
        schedule.next_end = min(plan_of(model).schedule_ends(), default=math.inf)
        schedule.modules = _scheduled(trainer)
    if schedule.next_end == math.inf:
        delattr(trainer, _STATE)


def _scheduled(trainer: Any) -> list[Scheduled]:
    networks = (task_model(trainer.model), *([trainer.ema.ema] if trainer.ema else []))
    return [module for network in networks for module in scheduled_modules(network)]


def task_model(model: Any) -> nn.Module:
    """Return the task model inside the wrappers of several GPUs and of the compiler."""
    inner = getattr(model, "module", model)
    return getattr(inner, "_orig_mod", inner)
