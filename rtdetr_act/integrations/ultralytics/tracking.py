"""Record activation parameters during training: in `activations.csv` and in experiment trackers.

The trackers (TensorBoard, MLflow, W&B, Comet, ClearML) get the plan and, after every epoch, the quantities in the file.
Training is not affected: no random numbers are drawn, no state changes, and a failure (a full disk, a model that does
not accept the images) is logged as one warning. Only the first of several workers keeps a record.

Ultralytics' tracker callbacks log `trainer.metrics` after every epoch. The quantities are therefore in
`trainer.metrics` only while those callbacks run: results.csv and the checkpoint of an epoch are written before, and
those of the next epoch must not contain them. The plan is known only after the model is built, when most trackers have
logged their settings, so it is logged to each active tracker through that tracker's API.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import RANK, SETTINGS

from rtdetr_act.analysis.history import FIGURE_FILE, HISTORY_FILE, write_quantities
from rtdetr_act.analysis.learned import Quantity, has_coefficients, read_quantities
from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.integrations.ultralytics.trainers import is_managed
from rtdetr_act.surgery.model_plan import read_plan

PREFIX = "activations/"
_RECORD = "activation_record"  # where a trainer keeps its Record


@dataclass
class Record:
    """The record of the activations in one training.

    Attributes:
        history: Path of `activations.csv`.
        images: Validation images on which coefficients are measured; empty if no activation has coefficients.
        pending: Quantities of the last epoch that trackers have not logged yet.
        warned: Whether a warning that the file cannot be written has been logged.
    """

    history: Path
    images: list[Tensor] = field(default_factory=list)
    pending: list[Quantity] = field(default_factory=list)
    warned: bool = False


def add_callbacks(trainer: Any) -> None:
    """Add callbacks to a trainer, before and after those of the trackers, which must exist; idempotent."""
    callbacks = trainer.callbacks
    for event, callback in (
        ("on_train_start", log_plan),
        ("on_train_start", clone_inference_tensors),
        ("on_train_start", start_record),
        ("on_train_epoch_end", record_epoch),
    ):
        if callback not in callbacks[event]:
            callbacks[event].append(callback)
    # Ultralytics 8.3 reuses the callbacks of a model in its next training, which may have other trackers.
    others = [callback for callback in callbacks["on_fit_epoch_end"] if callback not in (add_metrics, remove_metrics)]
    callbacks["on_fit_epoch_end"] = [add_metrics, *others, remove_metrics]


def clone_inference_tensors(trainer: Any) -> None:
    """Replace inference tensors cached on modules by clones, so that a model traced by TensorBoard can be trained.

    TensorBoard traces the model in inference mode, and the decoder of RT-DETR (since 8.4) caches the anchors of that
    pass. In the first training step autograd then raises "Inference tensors cannot be saved for backward".
    """
    if not is_managed(trainer):
        return
    for module in trainer.model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_inference():
                setattr(module, name, value.clone())


def start_record(trainer: Any) -> None:
    """Create the record of a training: choose the images, and write epoch 0 unless the training is resumed."""
    if RANK not in (-1, 0) or not is_managed(trainer):
        return
    folder = Path(trainer.save_dir)
    record = Record(folder / HISTORY_FILE)
    setattr(trainer, _RECORD, record)
    if trainer.start_epoch == 0:  # a reused folder (exist_ok=True) may have files of another training
        for name in (HISTORY_FILE, FIGURE_FILE):
            _try_to_write(record, (folder / name).unlink, missing_ok=True)
    if has_coefficients(trainer.ema.ema):
        try:
            record.images = pick_images(trainer.test_loader.dataset)
        except Exception as error:  # must not stop the training
            log(f"the coefficients of the activations are not recorded, for want of images: {error}", warn=True)
    if trainer.start_epoch == 0:
        _write(record, 0, _read_quantities(trainer, record))


def record_epoch(trainer: Any) -> None:
    """Write the quantities of the EMA model, which the checkpoint of this epoch stores, to the file.

    This happens before the checkpoint (or a study's snapshot) is saved, so that a resumed training finds all earlier
    epochs in the file.
    """
    if record := get_record(trainer):
        record.pending = _read_quantities(trainer, record)
        _write(record, trainer.epoch + 1, record.pending)


def get_record(trainer: Any) -> Record | None:
    """Return the record of a trainer, None if it keeps none."""
    found: Record | None = vars(trainer).get(_RECORD)
    return found


def _read_quantities(trainer: Any, record: Record) -> list[Quantity]:
    """Read the quantities of the EMA model, without coefficients if measuring them fails."""
    model = trainer.ema.ema
    try:
        # The batch size of the validation, which fits into memory.
        return read_quantities(model, record.images, batch=trainer.test_loader.batch_size)
    except Exception as error:  # out of GPU memory, or a model that needs more inputs than an image
        log(f"the coefficients of the activations are not recorded: {error}", warn=True)
        record.images = []
        return read_quantities(model)


def _write(record: Record, epoch: int, quantities: list[Quantity]) -> None:
    """Append quantities to the history of a record."""
    if quantities:
        _try_to_write(record, write_quantities, record.history, epoch, quantities)


def _try_to_write(record: Record, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function that writes a file; log a warning for the first OSError of a training."""
    try:
        write(*args, **kwargs)
    except OSError as error:
        if not record.warned:
            log(f"{record.history} is incomplete: {error.strerror or error}; the training goes on", warn=True)
        record.warned = True


def add_metrics(trainer: Any) -> None:
    """Add the pending quantities to `trainer.metrics`; only once, since the final validation is not an epoch."""
    record = get_record(trainer)
    if record and record.pending:
        values, record.pending = record.pending, []
        trainer.metrics = {**trainer.metrics, **{f"{PREFIX}{one.site}.{one.name}": one.value for one in values}}


def remove_metrics(trainer: Any) -> None:
    """Remove the quantities from `trainer.metrics`, which an epoch without validation would reuse."""
    if any(name.startswith(PREFIX) for name in trainer.metrics or ()):
        trainer.metrics = {name: value for name, value in trainer.metrics.items() if not name.startswith(PREFIX)}


def log_plan(trainer: Any) -> None:
    """Log the plan of a patched model to every active tracker; a failure is logged as a warning."""
    plan = read_plan(trainer.ema.ema)
    if not plan:
        return
    settings = {PREFIX + "plan": str(plan), PREFIX + "act_lr": plan.act_lr}
    for name, send in _SENDERS.items():
        # Trackers that are disabled in Ultralytics' settings are skipped.
        tracker = sys.modules.get(f"ultralytics.utils.callbacks.{name}")
        if tracker is None or tracker.callbacks.get("on_fit_epoch_end") not in trainer.callbacks["on_fit_epoch_end"]:
            continue
        try:
            send(tracker, settings)
        except Exception as error:  # must not stop the training
            log(f"the plan was not logged to {name}: {error}", warn=True)


# Each function takes Ultralytics' module of a tracker, through which the tracker's package is accessed.


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
# Packages by the names of trackers in Ultralytics' settings.
_PACKAGES = {name: name for name in ("tensorboard", "mlflow", "wandb", "clearml")} | {"comet": "comet_ml"}


def list_trackers() -> dict[str, bool]:
    """Return the trackers that are installed, each with whether it is on in Ultralytics' settings."""
    return {name: SETTINGS.get(name) is True for name, module in _PACKAGES.items() if find_spec(module)}
