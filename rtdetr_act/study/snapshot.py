"""Snapshots from which a training resumes exactly.

Ultralytics' own resume takes the weights from the EMA in half precision, rounds the optimizer state, draws the batches
of the first epoch again, and restarts all random number generators, so that the result differs from that of an
uninterrupted run. A snapshot contains the whole state after an epoch. Without data loader workers, as always on a CPU,
a run that is killed any number of times has the same final weights, bit for bit; with them, augmentation differs.
"""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtdetr_act.files import write_atomically
from rtdetr_act.integrations.ultralytics.trainers import task_model
from rtdetr_act.study.averaging import RecentWeights


class Snapshots:
    """Callbacks that save the state of a training on one device after each epoch, and restore it at the start.

    Args:
        path: The snapshot, written atomically after each epoch but the last. If it exists when a training starts, the
            training resumes from it.
        recent: Weights of the last epochs, saved and restored with the rest; None if they are not kept.
    """

    def __init__(self, path: Path, recent: RecentWeights | None = None) -> None:
        self.path = path
        self.recent = recent
        self.state: dict[str, Any] | None = None
        self.updates = 0  # optimizer steps so far
        self.batches_since_step = 0  # batches since the last optimizer step

    def attach(self, model: Any) -> None:
        """Add the callbacks to an RTDETR or YOLO model."""
        model.add_callback("on_pretrain_routine_end", self._restore)
        model.add_callback("on_train_start", self._set_clock)
        model.add_callback("on_train_epoch_start", self._restore_random_state)
        model.add_callback("on_train_batch_end", self._count_steps)
        model.add_callback("on_fit_epoch_end", self._save)

    def _save(self, trainer: Any) -> None:
        """Write a snapshot after an epoch."""
        if trainer.stop:  # the final validation triggers this event once more
            return
        model = task_model(trainer.model)
        dataset = trainer.train_loader.dataset
        state = {
            "epoch": trainer.epoch,
            "model": model.state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "updates": trainer.ema.updates,
            "recent": list(self.recent.epochs) if self.recent else [],
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "best_fitness": trainer.best_fitness,
            "stopper": vars(trainer.stopper),
            "results": trainer.csv.read_bytes(),
            "seconds": time.time() - trainer.train_time_start,
            "since": self.batches_since_step,
            "gradients": {
                name: p.grad for name, p in model.named_parameters() if p.grad is not None and self.batches_since_step
            },
            "buffer": list(getattr(dataset, "buffer", ())),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.path, content.getvalue())

    def _restore(self, trainer: Any) -> None:
        """Restore models, optimizer and results from the snapshot, if there is one."""
        self.updates = trainer.ema.updates
        state = self._read()
        if state is None:
            # Ultralytics before 8.4 would append to the results of a run that was killed before its first snapshot.
            trainer.csv.unlink(missing_ok=True)
            return
        ema = trainer.ema.ema
        ema.load_state_dict(state["ema"])
        before = trainer.resume, trainer.args.close_mosaic
        if trainer.epochs < trainer.args.close_mosaic:
            # Ultralytics before 8.4 closes the mosaic when it resumes so short a run, but not in an uninterrupted one.
            trainer.args.close_mosaic = 0
        trainer.resume = True
        trainer.resume_training({**state, "ema": ema})
        trainer.resume, trainer.args.close_mosaic = before
        trainer.scheduler.last_epoch = trainer.start_epoch - 1
        task_model(trainer.model).load_state_dict(state["model"])
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.stopper.__dict__.update(state["stopper"])
        write_atomically(trainer.csv, state["results"])
        if self.recent:
            self.recent.epochs.extend(state["recent"])
        self.state, self.batches_since_step, self.updates = state, state["since"], state["updates"]

    def _read(self) -> dict[str, Any] | None:
        """Return the contents of the snapshot, or None if it is missing or damaged."""
        if not self.path.is_file():
            return None
        try:
            # A file of this study; weights_only would reject the state of NumPy's generator.
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=False)
        except Exception:  # any error of unpickling a damaged file: start from the beginning
            return None
        return state

    def _set_clock(self, trainer: Any) -> None:
        """Set the start of the training back by the seconds that it took before the snapshot."""
        if self.state is not None:
            trainer.train_time_start -= self.state["seconds"]

    def _restore_random_state(self, trainer: Any) -> None:
        """Restore gradients and random states, after all else that draws numbers or clears gradients."""
        if self.state is None:
            return
        state, self.state = self.state, None
        if trainer.train_loader.num_workers == 0:
            _replay_batch_order(trainer)
            for index in state["buffer"]:  # images buffered for the next mosaic
                trainer.train_loader.dataset.load_image(index)
        for name, parameter in task_model(trainer.model).named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)
        _delay_first_step(trainer, self.batches_since_step)
        python, numpy, torch_state = state["random"]
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])

    def _count_steps(self, trainer: Any) -> None:
        """Count the batches since the last optimizer step."""
        stepped = trainer.ema.updates != self.updates
        self.updates = trainer.ema.updates
        self.batches_since_step = 0 if stepped else self.batches_since_step + 1


def _replay_batch_order(trainer: Any) -> None:
    """Draw the batch indices of all earlier epochs without reading images, so that the next ones are the same."""
    loader = trainer.train_loader
    closed = trainer.epochs - trainer.args.close_mosaic if trainer.args.close_mosaic else None
    for epoch in range(trainer.start_epoch):
        if epoch == closed:
            loader.reset()
        if loader.iterator is None:
            loader.iterator = loader._get_iterator()
        for _ in range(len(loader)):
            loader.iterator._next_index()
    if closed is not None and trainer.start_epoch > closed:
        # Ultralytics since 8.4 closes the mosaic again after resuming, which would restart the order of the batches.
        loader.reset = lambda: vars(loader).pop("reset", None)


def _delay_first_step(trainer: Any, batches_before: int) -> None:
    """Make the first optimizer step after a resume happen at the right batch.

    The training loop steps after its first batch, since the number of its last step is a local variable that is lost
    on resume. Without the interruption it would step once `accumulate` batches have accumulated. `accumulate`, which
    the loop compares with, therefore becomes a property that is infinite until then.

    Args:
        trainer: Ultralytics trainer.
        batches_before: Batches since the last step at the time of the snapshot.
    """
    cls, batches, updates = type(trainer), 0, trainer.ema.updates

    def read(self: Any) -> float:
        nominal: int = vars(self)["accumulate"]
        return nominal if batches + batches_before >= nominal else float("inf")

    def count(_: Any) -> None:
        nonlocal batches
        batches += 1

    def write(self: Any, value: int) -> None:
        vars(self)["accumulate"] = value

    def end(self: Any) -> None:
        if self.ema.updates != updates:
            self.__class__ = cls

    trainer.__class__ = type(cls.__name__, (cls,), {"accumulate": property(read, write)})
    trainer.callbacks["on_train_batch_start"].append(count)
    trainer.callbacks["on_train_batch_end"].append(end)
