"""What trackers (TensorBoard, MLflow, W&B, Comet, ClearML) get to see: the plan and the learned parameters.

Ultralytics' own tracker callbacks do the logging: all of them send `trainer.metrics` after every epoch. So the
parameters stand in `trainer.metrics` while those callbacks run, and at no other time: results.csv and the checkpoint
of an epoch are written before, and those of the next must not find them. The plan is known once the model is built,
when most trackers have sent their settings already; so it goes to each that is active, by that tracker's own call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.sites import placed_activations
from rtdetr_act.training import slopes
from rtdetr_act.ultralytics_hooks import log, plan_of

PREFIX = "activations/"
_READ = "activation_parameters"  # where a trainer keeps what was read until it is logged


@torch.no_grad()
def learned_parameters(model: nn.Module) -> dict[str, float]:
    """Read the learned parameters of the activations that a swap placed in a model, by `site.parameter`.

    AReLU's are as it uses them, `alpha` clamped to 0.01..0.99 and `beta` the sigmoid of the stored one. A parameter
    per channel is its mean over the channels. Of the weights that generate slopes from the input (Dynamic ReLU,
    Meta-ACON) or make a condition of it (FReLU), a site has one number, `weights_norm`: the L2 norm of them all.

    Returns:
        The numbers in the order of the sites; empty for a model without learnable placed activations.

    >>> from rtdetr_act import patch_model
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> _ = patch_model(model, "prelu")
    >>> learned_parameters(model)
    {'1.weight': 0.25}
    """
    single = {id(parameter) for parameter in slopes(model)}
    return {
        f"{site}.{name}": value.item()
        for site, activation in placed_activations(model)
        for name, value in _summaries(activation, single)
    }


def _summaries(activation: nn.Module, single: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, scalar) of one activation; `single` has the ids of scalar and per-channel parameters."""
    if isinstance(activation, AReLU):
        yield "alpha", activation.slopes()[1]
        yield "beta", torch.sigmoid(activation.beta)
        return
    weights = []
    for name, parameter in activation.named_parameters():
        if id(parameter) in single:
            yield name, parameter.float().mean()
        else:
            weights.append(parameter.float().norm())
    if weights:
        yield "weights_norm", torch.stack(weights).norm()


def add_callbacks(trainer: Any) -> None:
    """Put our callbacks around those of the trackers, which a trainer has already; again does nothing more."""
    callbacks = trainer.callbacks
    for event, callback in (("on_train_start", log_plan), ("on_train_start", thaw), ("on_train_epoch_end", read)):
        if callback not in callbacks[event]:
            callbacks[event].append(callback)
    # Ultralytics 8.3 keeps the lists of a model for its next training, whose trackers may be others.
    others = [callback for callback in callbacks["on_fit_epoch_end"] if callback not in (show, hide)]
    callbacks["on_fit_epoch_end"] = [show, *others, hide]


def thaw(trainer: Any) -> None:
    """Let a model be trained whose graph TensorBoard has drawn, patched or not.

    It is traced in inference mode, and the decoder of RT-DETR keeps the anchors of that pass (8.4 does) for the first
    training step, which autograd then refuses: "Inference tensors cannot be saved for backward".
    """
    for module in trainer.model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(module, name, value.clone())


def read(trainer: Any) -> None:
    """Read the parameters of the averaged model, which the checkpoint of this epoch will hold."""
    setattr(trainer, _READ, learned_parameters(trainer.ema.ema))


def show(trainer: Any) -> None:
    """Put what was read into `trainer.metrics`, once: the validation of best.pt at the end is no epoch."""
    values = vars(trainer).pop(_READ, None)
    if values and trainer.metrics is not None:  # only the first of several workers has metrics
        trainer.metrics = {**trainer.metrics, **{PREFIX + name: value for name, value in values.items()}}


def hide(trainer: Any) -> None:
    """Take them out of `trainer.metrics` again: an epoch without validation would write the same dictionary."""
    if any(name.startswith(PREFIX) for name in trainer.metrics or ()):
        trainer.metrics = {name: value for name, value in trainer.metrics.items() if not name.startswith(PREFIX)}


def log_plan(trainer: Any) -> None:
    """Send the plan of a patched model to every active tracker; one that fails is named in a warning."""
    plan = plan_of(trainer.ema.ema)
    if not plan:
        return
    settings = {PREFIX + "plan": str(plan), PREFIX + "act_lr": plan.act_lr}
    for name, send in _SENDERS.items():
        # A tracker that Ultralytics does not log to, because of its settings, gets nothing of us either.
        tracker = sys.modules.get(f"ultralytics.utils.callbacks.{name}")
        if tracker is None or tracker.callbacks.get("on_fit_epoch_end") not in trainer.callbacks["on_fit_epoch_end"]:
            continue
        try:
            send(tracker, settings)
        except Exception as error:  # whatever a tracker raises, it must not stop a training
            log(f"the plan was not logged to {name}: {error}", warn=True)


# Each takes Ultralytics' module for a tracker, which has imported it.


def _to_tensorboard(tracker: Any, settings: dict[str, Any]) -> None:
    if tracker.WRITER:
        for name, value in settings.items():
            tracker.WRITER.add_text(name, str(value))


def _to_mlflow(tracker: Any, settings: dict[str, Any]) -> None:
    if tracker.mlflow.active_run():  # logging without one would start a run
        tracker.mlflow.log_params(settings)


def _to_wandb(tracker: Any, settings: dict[str, Any]) -> None:
    if tracker.wb.run:
        tracker.wb.run.config.update(settings, allow_val_change=True)  # on resume they are there already


def _to_comet(tracker: Any, settings: dict[str, Any]) -> None:
    if experiment := tracker.comet_ml.get_global_experiment():
        experiment.log_parameters(settings)


def _to_clearml(tracker: Any, settings: dict[str, Any]) -> None:
    if task := tracker.Task.current_task():
        task.update_parameters({f"General/{name}": value for name, value in settings.items()})


_SENDERS = {
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "wb": _to_wandb,
    "comet": _to_comet,
    "clearml": _to_clearml,
}
