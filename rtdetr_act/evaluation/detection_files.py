"""Files beside a run: what its detector found on the validation images, and its scores on resamples of them."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_act.errors import InputError, reason
from rtdetr_act.evaluation.bootstrap import HEADLINES, RESAMPLES, Scores, draw_resamples, score_resamples
from rtdetr_act.evaluation.detections import Detections, GroundTruth
from rtdetr_act.evaluation.matching import MAX_DETECTIONS, match_detections

_ARRAYS = ("observed", "resampled", "influences")


@dataclass(frozen=True)
class RunScores:
    """Scores of one run on resamples of its validation images.

    Attributes:
        scores: The scores.
        categories: Names of the categories, in the order of the scores.
        truth: Digest of the images and their labelled boxes: runs compare if theirs are equal.
    """

    scores: Scores
    categories: tuple[str, ...]
    truth: str


def encode_detections(truth: GroundTruth, found: Detections) -> bytes:
    """Return labelled boxes and detections as the contents of a compressed NumPy file.

    Images are named by their paths below the folder that they share, so that the files of several machines compare. Of
    each image and category, the detections that COCO's average precision counts are kept.

    Args:
        truth: The labelled boxes, with images by path.
        found: The detections.
    """
    order = np.lexsort((-found.scores, found.labels, found.images))
    groups = np.stack([found.images, found.labels], axis=1)[order]
    starts = np.flatnonzero(np.append(True, (np.diff(groups, axis=0) != 0).any(1))) if len(order) else order
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    kept = order[ranks < MAX_DETECTIONS]
    return _encode({
        "image_ids": np.array(_name_images(truth)), "categories": np.array(truth.categories),
        "truth_images": truth.images.astype(np.int32), "truth_labels": truth.labels.astype(np.int32),
        "truth_boxes": truth.boxes.astype(np.float32), "crowds": truth.crowds, "areas": truth.areas.astype(np.float32),
        "images": found.images[kept].astype(np.int32), "labels": found.labels[kept].astype(np.int32),
        "boxes": found.boxes[kept].astype(np.float32), "scores": found.scores[kept].astype(np.float32),
    })  # fmt: skip


def encode_scores(truth: GroundTruth, found: Detections) -> bytes:
    """Return the scores of a detector on the images and on a thousand resamples, as the contents of a NumPy file.

    Args:
        truth: The labelled boxes.
        found: The detections.
    """
    resamples = draw_resamples(len(truth.image_ids), RESAMPLES)
    scores = score_resamples(match_detections(truth, found), resamples)
    return _encode({
        "observed": scores.observed, "resampled": scores.resampled.astype(np.float32),
        "influences": scores.influences.astype(np.float32), "categories": np.array(truth.categories),
        "truth": np.array(_digest(truth)),
    })  # fmt: skip


def read_scores(path: Path) -> RunScores | None:
    """Return the scores that `encode_scores` wrote to a file; None if it does not exist.

    Raises:
        InputError: The file cannot be read, or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            observed, resampled, influences = (data[name].astype(float) for name in _ARRAYS)
            categories, digest = tuple(map(str, data["categories"])), str(data["truth"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, reason(error)) from None
    rows = len(HEADLINES) + len(categories)
    if observed.shape != (rows,) or any(each.ndim != 2 or len(each) != rows for each in (resampled, influences)):
        raise _damaged(path, "its arrays do not fit each other")
    return RunScores(Scores(observed, resampled, influences), categories, digest)


def select_scores(runs: Iterable[RunScores], truth: str) -> list[Scores]:
    """Return the scores of the runs whose images and labelled boxes have a digest, in their order."""
    return [each.scores for each in runs if each.truth == truth]


def _damaged(path: Path, why: str) -> InputError:
    """Return an error that names a damaged file, and what to do about it."""
    return InputError(f"'{path}' is damaged: {why}; delete it, and the report leaves this run out of its bootstrap")


def _name_images(truth: GroundTruth) -> list[str]:
    """Return the paths of images below the folder that they share."""
    folder = os.path.commonpath([str(Path(each).parent) for each in truth.image_ids])
    return [Path(each).relative_to(folder).as_posix() for each in truth.image_ids]


def _digest(truth: GroundTruth) -> str:
    """Return a digest of images and their labelled boxes."""
    text = "\0".join([*_name_images(truth), "", *truth.categories]).encode()
    arrays = (truth.images.astype("<i8"), truth.labels.astype("<i8"), truth.boxes.astype("<f4"))
    return hashlib.sha256(b"".join([text, *(each.tobytes() for each in arrays)])).hexdigest()


def _encode(arrays: dict[str, Any]) -> bytes:
    """Return named arrays as the contents of a compressed NumPy file."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()
