"""Validate a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rtdetr_act.deploy.fold import FoldReport, fold_activations
from rtdetr_act.integrations.ultralytics.datasets import resolve_data, training_data
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.integrations.ultralytics.results import read_scores


def validate_checkpoint(
    weights: str | Path,
    data: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    fold: bool = False,
    show_fold: Callable[[FoldReport], object] | None = None,
) -> dict[str, float]:
    """Validate a checkpoint through Ultralytics.

    Args:
        weights: A .pt checkpoint.
        data: Data set, as in Ultralytics, or "shapes"; None (default) for the one that the checkpoint was trained on.
        arguments: Ultralytics' validation arguments, such as {"imgsz": 640, "batch": 16}.
        fold: Fold the activations into the weights first, in memory only.
        show_fold: Called with the report of the fold before the validation starts.

    Returns:
        The two headline scores of the task, as fractions of 1: {"mAP50": …, "mAP50-95": …} for detection.

    Raises:
        InputError: The checkpoint or the data set does not exist, or Ultralytics cannot use an argument.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
        FoldError: The fold would change what the model computes.
        Interrupted: The user pressed Ctrl-C.
    """
    model = load_checkpoint(weights)
    settings = dict(arguments or {})
    if data is not None:
        settings["data"] = resolve_data(data)
    if fold:
        report = fold_activations(model)
        if show_fold:
            show_fold(report)
    if data is None:
        settings["data"] = training_data(model)
    with translate_errors(**settings):
        return read_scores(model.val(**settings))
