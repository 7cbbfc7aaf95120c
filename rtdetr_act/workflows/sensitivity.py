"""Measure what the swap of each site of a checkpoint costs, and propose which to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rtdetr_act.analysis.diagnosis import preserve_random_state
from rtdetr_act.analysis.sensitivity import BOUND, MOST, Sensitivity, measure_sensitivity
from rtdetr_act.analysis.sensitivity_report import write_sensitivity
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import output_folder
from rtdetr_act.integrations.ultralytics.arguments import check_positive_integers, move_to
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data, training_data
from rtdetr_act.integrations.ultralytics.images import (
    load_batches,
    open_validation,
    pick_images,
    score_images,
    training_imgsz,
)
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.integrations.ultralytics.run_folders import name_checkpoints
from rtdetr_act.integrations.ultralytics.warm_start import IMAGES, ImageBatches
from rtdetr_act.surgery.plan import Scope

_DEFAULT_IMGSZ = 640  # where the checkpoint does not tell
# Of the images of a refit, of which there are about a hundred: 128 images of 320 x 320, as `refit` recommends.
_FIT_PIXELS = IMAGES * 320 * 320


def measure_checkpoint_sensitivity(
    source: str | Path,
    activation: str,
    data: str | Path | None,
    output: str | Path,
    *,
    images: int = 128,
    imgsz: int | None = None,
    batch: int = 4,
    device: str = "cpu",
    scope: Scope = "conv",
    bound: float = BOUND,
    most: float = MOST,
    show: Callable[[str, Sensitivity], object] | None = None,
    show_progress: Callable[[str], object] | None = None,
) -> tuple[Sensitivity, list[Path]]:
    """Measure what the swap of each site and stage of a checkpoint costs, and propose the plan that keeps the fewest.

    Networks are refitted on training images without augmentation. Their training loss, in evaluation mode, is measured
    on images of the validation split, also without augmentation: on every second batch for the choice of the plan, on
    the others to score it.

    Args:
        source: A .pt checkpoint; its file is not changed.
        activation: An activation, or a plan, as in `measure_sensitivity`.
        data: Data set, as in Ultralytics, or "shapes"; None for the one that the checkpoint was trained on.
        output: Folder for the files, which is made if need be.
        images: Number of labelled images, taken at equal distances from the validation split. Default: 128.
        imgsz: Side of the images, in pixels. Default: None, that of the training.
        batch: Images of a labelled batch. Default: 4.
        device: "cpu" (default), "cuda" or "cuda:1".
        scope: "conv" (default) for convolutional sites, "all" for transformer sites too.
        bound: As in `measure_sensitivity`. Default: 0.01.
        most: As in `measure_sensitivity`. Default: 0.25.
        show: Called with a title and the measurement before the files are written. Default: None.
        show_progress: As in `measure_sensitivity`. Default: None.

    Returns:
        The measurement, and the files written.

    Raises:
        RtdetrActError: The checkpoint, the activation, the data or the device is wrong, or the folder cannot be
            written to.
    """
    check_positive_integers(images=images, batch=batch, **({} if imgsz is None else {"imgsz": imgsz}))
    folder = Path(output)
    model = load_checkpoint(source)
    dataset_name = training_data(model) if data is None else resolve_data(data)
    dataset = check_data(dataset_name, str(model.task))
    if (count := int(dataset["nc"])) > (own := int(model.model.yaml["nc"])):
        raise InputError(
            f"{quote(str(source))} knows {own} classes, and {quote(dataset_name)} has {count}: give data like its own"
        )
    size = training_imgsz(model, _DEFAULT_IMGSZ) if imgsz is None else imgsz
    module = move_to(model.model, device)
    where = str(next(module.parameters()).device)
    halves = slice(0, None, 2), slice(1, None, 2)

    def score(network: nn.Module) -> Mapping[str, float]:
        model.model = network  # of which a copy is validated
        return score_images(model, dataset_name, images, size, batch, where, halves[1])

    count = min(IMAGES, max(_FIT_PIXELS // size**2, 1))
    with output_folder(folder):  # which is not found wrong after minutes
        with preserve_random_state():
            _, training = open_validation(model, {**dataset, "val": dataset["train"]}, size)
            fit_images = ImageBatches(pick_images(training, count))
            choosing, scoring = (load_batches(model, dataset, images, size, batch, where, half) for half in halves)
        _check_labels([*choosing, *scoring], dataset_name)
        found = measure_sensitivity(
            module,
            activation,
            fit_images,
            choosing,
            scoring,
            scope=scope,
            bound=bound,
            most=most,
            score=score,
            show_progress=show_progress,
        )
        title = f"{name_checkpoints([Path(source)])[0]} to {activation} on {Path(dataset_name).stem}"
        if show:
            show(title, found)
        return found, write_sensitivity(found, folder, title)


def _check_labels(batches: Sequence[Mapping[str, Any]], data: str) -> None:
    """Raise InputError if there is no label in any batch."""
    if not any(len(batch["cls"]) for batch in batches):
        raise InputError(f"the validation images of {quote(data)} have no labels, which the loss needs")
