"""Boxes that Ultralytics' validation finds, and the labels of its data set, in pixels of the original images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_act.errors import InputError, quote
from rtdetr_act.evaluation.detections import Detections, GroundTruth
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.log import log_level


def collect_detections(model: Any, **settings: Any) -> tuple[GroundTruth, Detections]:
    """Validate a detector, and return the labelled boxes, with images by path, and the boxes that it found.

    Args:
        model: RTDETR or YOLO object for detection; Ultralytics fuses it.
        **settings: Arguments of Ultralytics' `val`, `data` among them.

    Raises:
        InputError: The model is not a detector, or Ultralytics cannot use the data or an argument.
    """
    if model.task != "detect":
        raise InputError(f"boxes are compared, and {quote(str(model.ckpt_path))} is a model to {model.task}")
    made: list[Any] = []
    cls = _make_collector(model.task_map[model.task]["validator"], made)
    # It would say that results were saved in a folder that is gone.
    with translate_errors(**settings), log_level(logging.WARNING), tempfile.TemporaryDirectory() as folder:
        own = {"save_json": True, "plots": False, "project": folder}
        model.val(validator=cls, **{**settings, **own})
    validator = made[-1]
    labels = sorted(validator.dataloader.dataset.labels, key=lambda each: str(each["im_file"]))
    names = [validator.names[key] for key in sorted(validator.names)]
    truth = _read_labels(labels, validator.shapes, names)
    places = {path: index for index, path in enumerate(truth.image_ids)}
    classes = {category: index for index, category in enumerate(validator.class_map)}
    found = validator.jdict
    return truth, Detections(
        images=np.array([places[each["image_id"]] for each in found], np.int64),
        labels=np.array([classes[each["category_id"]] for each in found], np.int64),
        boxes=np.array([each["bbox"] for each in found], float).reshape(-1, 4),
        scores=np.array([each["score"] for each in found], float),
    )


def _make_collector(base: Any, made: list[Any]) -> Any:
    """Return a subclass of a validator that names images by path, and evaluates no JSON, for which it would install.

    Args:
        base: Class of Ultralytics' validator.
        made: List to which its instances are appended.
    """

    class Collector(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.shapes: dict[str, tuple[int, int]] = {}
            made.append(self)

        def update_metrics(self, preds: Any, batch: Any) -> None:
            self.shapes |= dict(zip(map(str, batch["im_file"]), batch["ori_shape"], strict=True))
            super().update_metrics(preds, batch)

        def pred_to_json(self, predn: Any, source: Any) -> None:
            start = len(self.jdict)
            super().pred_to_json(predn, source)
            # Ultralytics names an image by its file name without folder and extension, which two images may share. The
            # second argument is the file in older releases.
            name = source["im_file"] if isinstance(source, dict) else source
            for each in self.jdict[start:]:
                each["image_id"] = str(Path(name))

        def eval_json(self, stats: Any) -> Any:
            return stats

    return Collector


def _read_labels(labels: Sequence[Any], shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> GroundTruth:
    """Return the labelled boxes of an Ultralytics data set.

    Args:
        labels: Its labels, with `im_file`, `cls` (N, 1) and `bboxes` (N, 4), centre and size as fractions of the image.
        shapes: Height and width of each image in pixels, by its file.
        names: Names of the categories.
    """
    boxes = []
    for each in labels:
        height, width = shapes[str(each["im_file"])]
        centres, sides = np.split(
            np.asarray(each["bboxes"], float).reshape(-1, 4) * [width, height, width, height], [2], axis=1
        )
        boxes.append(np.concatenate([centres - sides / 2, sides], axis=1))
    stacked = np.concatenate([*boxes, np.empty((0, 4))])
    classes = [np.asarray(each["cls"], float).reshape(-1) for each in labels]
    return GroundTruth(
        image_ids=tuple(str(Path(each["im_file"])) for each in labels),
        categories=tuple(map(str, names)),
        images=np.repeat(np.arange(len(labels)), [len(each) for each in classes]),
        labels=np.concatenate([*classes, np.empty(0)]).astype(np.int64),
        boxes=stacked,
        areas=stacked[:, 2] * stacked[:, 3],
        crowds=np.zeros(len(stacked), bool),
    )
