"""What a training writes down of its activations: `activations.csv`, a picture, and what trackers get to see.

The trackers (TensorBoard, MLflow, W&B, Comet, ClearML) get the plan and, after every epoch, the quantities that the
file gets. Nothing of it touches the training: no random number is drawn, no state changed, and what fails (a full disk,
a model that refuses the images) is one warning. Of several workers only the first keeps a record.

Ultralytics' own tracker callbacks do the logging: all of them send `trainer.metrics` after every epoch. So the
parameters stand in `trainer.metrics` while those callbacks run, and at no other time: results.csv and the checkpoint
of an epoch are written before, and those of the next must not find them. The plan is known once the model is built,
when most trackers have sent their settings already; so it goes to each that is active, by that tracker's own call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import RANK

from rtdetr_act.analysis.history import FIGURE_FILE, HISTORY_FILE, read_history, write_quantities
from rtdetr_act.analysis.history_figure import draw_history
from rtdetr_act.analysis.learned import Quantity, has_coefficients, read_quantities
from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.integrations.ultralytics.trainers import is_managed
from rtdetr_act.surgery.model_plan import read_plan

PREFIX = "activations/"
_RECORD = "activation_record"  # where a trainer keeps its Record


@dataclass
class Record:
    """What one training keeps of its activations.

    Attributes:
        history: The `activations.csv`.
        images: Validation images to measure coefficients on; none where no activation makes any.
        pending: Quantities of the last epoch that trackers have not logged yet.
        warned: Whether the user knows already that the file cannot be written.
    """

    history: Path
    images: list[Tensor] = field(default_factory=list)
    pending: list[Quantity] = field(default_factory=list)
    warned: bool = False


def add_callbacks(trainer: Any) -> None:
    """Put our callbacks around those of the trackers, which a trainer has already; again does nothing more."""
    callbacks = trainer.callbacks
    for event, callback in (
        ("on_train_start", log_plan),
        ("on_train_start", clone_inference_tensors),
        ("on_train_start", start_record),
        ("on_train_epoch_end", record_epoch),
        ("on_train_end", draw_figure),
    ):
        if callback not in callbacks[event]:
            callbacks[event].append(callback)
    # Ultralytics 8.3 keeps the lists of a model for its next training, whose trackers may be others.
    others = [callback for callback in callbacks["on_fit_epoch_end"] if callback not in (add_metrics, remove_metrics)]
    callbacks["on_fit_epoch_end"] = [add_metrics, *others, remove_metrics]


def clone_inference_tensors(trainer: Any) -> None:
    """Let a model be trained whose graph TensorBoard has drawn, a stock one where a command of ours trains it.

    It is traced in inference mode, and the decoder of RT-DETR keeps the anchors of that pass (8.4 does) for the first
    training step, which autograd then refuses: "Inference tensors cannot be saved for backward".
    """
    if not is_managed(trainer):
        return
    for module in trainer.model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(module, name, value.clone())


def start_record(trainer: Any) -> None:
    """Begin the record: choose the images, and write epoch 0 of a training that does not go on from an earlier one."""
    if RANK not in (-1, 0) or not is_managed(trainer):
        return
    folder = Path(trainer.save_dir)
    record = Record(folder / HISTORY_FILE)
    setattr(trainer, _RECORD, record)
    if trainer.start_epoch == 0:  # a folder that is used again (exist_ok=True) may hold those of another training
        for name in (HISTORY_FILE, FIGURE_FILE):
            _try_to_write(record, (folder / name).unlink, missing_ok=True)
    if has_coefficients(trainer.ema.ema):
        try:
            record.images = pick_images(trainer.test_loader.dataset)
        except Exception as error:  # whatever a data set raises, it must not stop a training
            log(f"the coefficients of the activations are not recorded, for want of images: {error}", warn=True)
    if trainer.start_epoch == 0:
        _write(record, 0, _read_quantities(trainer, record))


def record_epoch(trainer: Any) -> None:
    """Read the averaged model, which the checkpoint of this epoch will hold.

    And write it down before that checkpoint (or a study's snapshot) exists: whatever is resumed then finds every epoch
    before its own in the file.
    """
    if record := _get_record(trainer):
        record.pending = _read_quantities(trainer, record)
        _write(record, trainer.epoch + 1, record.pending)


def _get_record(trainer: Any) -> Record | None:
    found: Record | None = vars(trainer).get(_RECORD)
    return found


def _read_quantities(trainer: Any, record: Record) -> list[Quantity]:
    model = trainer.ema.ema
    try:
        # As many at once as the validation takes.
        return read_quantities(model, record.images, batch=trainer.test_loader.batch_size)
    except Exception as error:  # a GPU without room left, a model that takes more than an image
        log(f"the coefficients of the activations are not recorded: {error}", warn=True)
        record.images = []
        return read_quantities(model)


def _write(record: Record, epoch: int, quantities: list[Quantity]) -> None:
    if quantities:
        _try_to_write(record, write_quantities, record.history, epoch, quantities)


def _try_to_write(record: Record, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        write(*args, **kwargs)
    except OSError as error:
        if not record.warned:
            log(f"{record.history} is incomplete: {error.strerror or error}; the training goes on", warn=True)
        record.warned = True


def draw_figure(trainer: Any) -> None:
    """Draw the picture of a training that draws pictures at all."""
    record = _get_record(trainer)
    if record is None or not trainer.args.plots or not record.history.is_file():
        return
    try:
        draw_history(read_history(record.history), record.history.with_name(FIGURE_FILE), trainer.save_dir.name)
    except Exception as error:  # the training is done: no picture of it may spoil that
        log(f"{FIGURE_FILE} was not drawn: {error}", warn=True)


def add_metrics(trainer: Any) -> None:
    """Put what was read into `trainer.metrics`, once: the validation of best.pt at the end is no epoch."""
    record = _get_record(trainer)
    if record and record.pending:
        values, record.pending = record.pending, []
        trainer.metrics = {**trainer.metrics, **{f"{PREFIX}{one.site}.{one.name}": one.value for one in values}}


def remove_metrics(trainer: Any) -> None:
    """Take them out of `trainer.metrics` again: an epoch without validation would write the same dictionary."""
    if any(name.startswith(PREFIX) for name in trainer.metrics or ()):
        trainer.metrics = {name: value for name, value in trainer.metrics.items() if not name.startswith(PREFIX)}


def log_plan(trainer: Any) -> None:
    """Send the plan of a patched model to every active tracker; one that fails is named in a warning."""
    plan = read_plan(trainer.ema.ema)
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
