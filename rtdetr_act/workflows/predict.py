"""Predict on images and videos with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rtdetr_act.deploy.fold import FoldReport, fold_activations
from rtdetr_act.errors import InputError, quote
from rtdetr_act.integrations.ultralytics.arguments import set_project
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.models import load_checkpoint


def predict_source(
    weights: str | Path,
    source: Any,
    arguments: Mapping[str, Any] | None = None,
    *,
    fold: bool = False,
    show_fold: Callable[[FoldReport], object] | None = None,
) -> Path:
    """Predict on a source through Ultralytics, and save what it draws.

    Args:
        weights: A .pt checkpoint.
        source: What Ultralytics takes as `source`: an image, a folder, a video, a glob pattern, a URL, a camera number.
        arguments: Ultralytics' prediction arguments, such as {"conf": 0.25}; `save` is True unless it is among them.
        fold: Fold the activations into the weights first, in memory only.
        show_fold: Called with the report of the fold before the prediction starts.

    Returns:
        The folder of the results.

    Raises:
        InputError: The checkpoint or the source does not exist, or Ultralytics cannot use an argument.
        ModelError: The file is not a checkpoint, or holds a class that is not installed.
        FoldError: The fold would change what the model computes.
        Interrupted: The user pressed Ctrl-C.
    """
    model = load_checkpoint(weights)
    if fold:
        report = fold_activations(model)
        if show_fold:
            show_fold(report)
    if source is None:
        raise InputError("predict needs something to look at: add source=image.jpg (or a folder, a video, a URL)")
    is_path = isinstance(source, str) and "://" not in source and not any(mark in source for mark in "*?[")
    if is_path and not Path(source).exists():
        raise InputError(f"there is no source {quote(source)}")
    settings = {"save": True, **(arguments or {})}
    set_project(settings, str(model.task))
    with translate_errors(**settings):
        for _ in model.predict(source=source, stream=True, **settings):
            pass  # a stream, so that a long video is never held in memory whole
    return Path(model.predictor.save_dir)
