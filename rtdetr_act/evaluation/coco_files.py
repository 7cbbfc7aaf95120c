"""Ground truth and detections in COCO's JSON files, which most frameworks write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_act.errors import InputError, quote, reason
from rtdetr_act.evaluation.detections import Detections, GroundTruth
from rtdetr_act.formatting import format_count


class CocoFile:
    """Ground truth of a COCO file, and the identifiers by which files of detections name its images and categories.

    Args:
        path: JSON file with "images", "annotations" and "categories". Without "area", that of an annotation is its
            box's.

    Attributes:
        path: The file.
        truth: The labelled boxes; images and categories in the order of their identifiers.

    Raises:
        InputError: The file cannot be read, or is not a ground truth.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _read_json(path)
        if isinstance(data, list):
            raise InputError(
                f"'{path}' is a list, as a file of detections is: the ground truth comes last, with images, "
                "annotations and categories"
            )
        entries = {name: _take_entries(data, name, path) for name in ("images", "categories", "annotations")}
        self._images = _number(entries["images"], path, "images")
        self._labels = _number(entries["categories"], path, "categories")
        names = {each["id"]: str(each.get("name", each["id"])) for each in entries["categories"]}
        kept = entries["annotations"]
        for index, each in enumerate(kept):
            _check_entry(each, f"annotation {index} of '{path}'", ("image_id", "category_id", "bbox"))
            for key, known in (("image_id", self._images), ("category_id", self._labels)):
                if each[key] not in known:
                    raise InputError(f"annotation {index} of '{path}' has the {key} {quote(each[key])}, which it lacks")
        boxes = _stack_boxes(kept)
        areas = [_take_area(each, box) for each, box in zip(kept, boxes, strict=True)]
        self.truth = GroundTruth(
            image_ids=tuple(self._images),
            categories=tuple(names[label] for label in self._labels),
            images=np.array([self._images[each["image_id"]] for each in kept], np.int64),
            labels=np.array([self._labels[each["category_id"]] for each in kept], np.int64),
            boxes=boxes,
            areas=np.array(areas, float),
            crowds=np.array([bool(each.get("iscrowd")) for each in kept], bool),
        )

    def read_detections(self, path: Path, warn: Callable[[str], object]) -> Detections:
        """Return the detections of a file of results for these images.

        Args:
            path: JSON file, a list of entries with "image_id", "category_id", "bbox" and "score".
            warn: Called with a sentence if the file has no detections, or some of other categories, which are left out.

        Raises:
            InputError: The file cannot be read, is not a list of detections, or has images that the ground truth lacks.
        """
        data = _read_json(path)
        if not isinstance(data, list):
            what = "it has annotations, as a ground truth" if isinstance(data, dict) and "annotations" in data else ""
            raise InputError(f"'{path}' is not a list of detections{what and f': {what}, which comes last'}")
        for index, each in enumerate(data):
            _check_entry(each, f"detection {index} of '{path}'", ("image_id", "category_id", "bbox", "score"))
            if not _is_number(each["score"]):
                raise InputError(f"detection {index} of '{path}' has the score {quote(each['score'])}, not a number")
        if strange := sorted({str(each["image_id"]) for each in data if each["image_id"] not in self._images}):
            raise InputError(
                f"'{path}' has detections in {format_count(len(strange), 'image')} that '{self.path}' lacks, such as "
                f"{quote(strange[0])}: give the ground truth of the same images"
            )
        kept = [each for each in data if each["category_id"] in self._labels]
        if not data:
            warn(f"'{path}' has no detections: it scores 0")
        elif len(kept) < len(data):
            others = sorted({str(each["category_id"]) for each in data if each["category_id"] not in self._labels})
            warn(
                f"'{path}' has {format_count(len(data) - len(kept), 'detection')} of categories that '{self.path}' "
                f"lacks, which are left out: {', '.join(others[:5])}{', …' * (len(others) > 5)}"
            )
        return Detections(
            images=np.array([self._images[each["image_id"]] for each in kept], np.int64),
            labels=np.array([self._labels[each["category_id"]] for each in kept], np.int64),
            boxes=_stack_boxes(kept),
            scores=np.array([each["score"] for each in kept], float),
        )


def _read_json(path: Path) -> Any:
    """Return the contents of a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # JSON or UTF-8 that is damaged
        raise InputError(f"'{path}' is not a JSON file: {reason(error)}") from None


def _take_entries(data: Any, name: str, path: Path) -> list[Any]:
    """Return a list of a ground truth by its name."""
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise InputError(
            f"'{path}' has no list of {name}: a ground truth, which comes last, has images, annotations and categories"
        )
    return found


def _number(entries: Sequence[Any], path: Path, what: str) -> dict[Any, int]:
    """Return the position of each identifier of some images or categories, in ascending order as in COCO's tools."""
    for index, each in enumerate(entries):
        _check_entry(each, f"entry {index} of the {what} of '{path}'", ("id",))
    if not entries:
        raise InputError(f"'{path}' has no {what}")
    found = {each["id"] for each in entries}
    if len(found) < len(entries):
        raise InputError(f"'{path}' has {what} with the same id")
    order = sorted(found, key=lambda each: (isinstance(each, str), each))
    return {identifier: index for index, identifier in enumerate(order)}


def _check_entry(entry: Any, where: str, keys: Sequence[str]) -> None:
    """Check that an entry of a file has some keys, with identifiers and a box of the right kind."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {quote(entry)}, not an entry with {', '.join(keys)}")
    for key in keys:
        if key not in entry:
            raise InputError(f"{where} has no {key}")
        if key.endswith("id") and (isinstance(entry[key], bool) or not isinstance(entry[key], (int, str))):
            raise InputError(f"{where} has the {key} {quote(entry[key])}, which is neither a whole number nor a name")
    box = entry.get("bbox")
    if "bbox" in keys and not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise InputError(f"{where} has the bbox {quote(box)}, which is not [left, top, width, height] in pixels")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _stack_boxes(entries: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the boxes of some entries, (N, 4)."""
    return np.array([each["bbox"] for each in entries], float).reshape(-1, 4)


def _take_area(entry: Mapping[str, Any], box: Sequence[float]) -> float:
    """Return the area of an annotation in pixels, that of its box if it has none of its own."""
    area = entry.get("area")
    return float(area) if _is_number(area) else float(box[2] * box[3])  # type: ignore[arg-type]
