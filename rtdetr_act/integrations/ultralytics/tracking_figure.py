"""Draw what a training recorded of its activations; apart, since trainings without plots need no Matplotlib."""

from __future__ import annotations

from typing import Any

from rtdetr_act.analysis.history import FIGURE_FILE, read_history
from rtdetr_act.analysis.history_figure import draw_history
from rtdetr_act.integrations.ultralytics.log import log
from rtdetr_act.integrations.ultralytics.tracking import get_record


def add_figure_callback(trainer: Any) -> None:
    """Add a callback to a trainer that draws the figure once the training has ended; idempotent."""
    if draw_figure not in trainer.callbacks["on_train_end"]:
        trainer.callbacks["on_train_end"].append(draw_figure)


def draw_figure(trainer: Any) -> None:
    """Draw the history of a training as a figure, unless plots are disabled."""
    record = get_record(trainer)
    if record is None or not trainer.args.plots or not record.history.is_file():
        return
    try:
        draw_history(read_history(record.history), record.history.with_name(FIGURE_FILE), trainer.save_dir.name)
    except Exception as error:  # must not fail a finished training
        log(f"{FIGURE_FILE} was not drawn: {error}", warn=True)
