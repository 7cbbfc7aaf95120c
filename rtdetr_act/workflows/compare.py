"""Compare methods of detection by what they found, with confidence intervals from images drawn again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtdetr_act.errors import InputError, ModelError, quote
from rtdetr_act.evaluation.bootstrap import HEADLINES, RESAMPLES, Scores, draw_resamples, score_resamples
from rtdetr_act.evaluation.coco_files import CocoFile
from rtdetr_act.evaluation.detections import Detections, GroundTruth
from rtdetr_act.evaluation.differences import PRIMARY, ScoreDifference, compare_methods
from rtdetr_act.evaluation.matching import match_detections
from rtdetr_act.evaluation.statistics import LEARNED, NOTHING_LEARNED, summarise
from rtdetr_act.integrations.ultralytics.arguments import check_file_name, check_positive_integers
from rtdetr_act.integrations.ultralytics.datasets import resolve_data, training_data
from rtdetr_act.integrations.ultralytics.detections import collect_detections
from rtdetr_act.integrations.ultralytics.images import training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.integrations.ultralytics.run_folders import find_checkpoints, name_checkpoints
from rtdetr_act.results import Table, TableResult
from rtdetr_act.workflows.comparable import DEFAULT_IMGSZ, check_comparable

_FEWEST = 100  # resamples, with which a standard error is known within 7 %
_FEW = 0.9  # share of the images with labelled boxes in which a detector should find something


@dataclass(frozen=True)
class Method:
    """One of the methods that are compared.

    Attributes:
        name: Its name.
        files: Its checkpoints or files of detections, one per run.
        scores: Its headline scores as fractions of 1, means over the runs; NaN where no box is to be found.
        deviation: Standard deviation of mAP50-95 between the runs; NaN for a single one.
    """

    name: str
    files: tuple[str, ...]
    scores: dict[str, float]
    deviation: float


@dataclass(frozen=True, repr=False)
class DetectorComparison(TableResult):
    """Differences between methods of detection.

    Attributes:
        methods: The methods; the first is the baseline.
        rows: The differences of the others to it, those of each method together, the headline scores first.
        images: Number of images.
        boxes: Number of labelled boxes.
        resamples: Number of resamples of the images.
        data: The data set, "" where it is that of the trainings, or the file of the ground truth.
    """

    methods: tuple[Method, ...]
    rows: tuple[ScoreDifference, ...]
    images: int
    boxes: int
    resamples: int
    data: str

    def _summarise(self) -> str:
        """Return the methods, and the primary differences."""
        primary = [row for row in self.rows if row.score == PRIMARY and not row.is_category]
        return f"{self.methods[0].name} against " + "; ".join(
            f"{row.variant}: {PRIMARY} {row.difference:+.4f}, {row.over_images.verdict}" for row in primary
        )

    def _make_table(self) -> Table:
        """Return a row per difference and question."""
        columns = (
            "baseline", "variant", "score", "category", "baseline_score", "variant_score", "difference", "question",
            "error", "low", "high", "p", "p_holm", "verdict",
        )  # fmt: skip
        return columns, (
            (
                row.baseline, row.variant, PRIMARY if row.is_category else row.score,
                row.score if row.is_category else None, row.baseline_score, row.variant_score, row.difference, question,
                found.error, found.low, found.high, found.p, found.p_holm, found.verdict,
            )
            for row in self.rows
            for question, found in (("images", row.over_images), ("seeds and images", row.over_seeds_and_images))
            if found is not None
        )  # fmt: skip


def compare_detectors(
    sources: Sequence[str | Path | Sequence[str | Path]],
    data: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    resamples: int = RESAMPLES,
    warn: Callable[[str], object] = warnings.warn,
    show: Callable[[str], object] | None = None,
) -> DetectorComparison:
    """Compare the average precision of detectors, with intervals and p-values from a paired bootstrap over images.

    Average precision is COCO's, computed anew for each resample. With several runs of each method, a second test says
    whether the difference would hold with other seeds, too.

    Args:
        sources: A method each, the baseline first: a checkpoint, a COCO file of detections, a folder (the best.pt of
            each run in it, or its .json files), a pattern such as "runs/arelu-s*/weights/best.pt", several of these
            joined by commas, or a list of them. Several files of a method are runs with different seeds.
        data: For checkpoints, the data set as in Ultralytics, or "shapes"; None (default) for the one that all of them
            were trained on. For files of detections, the COCO file of the ground truth.
        arguments: Ultralytics' validation arguments for checkpoints, such as {"split": "test", "batch": 16}.
        resamples: Number of resamples of the images. Default: 1000.
        warn: Called with each warning, one sentence.
        show: Called with a line before each file is read or validated.

    Raises:
        InputError: Fewer than two methods are given, a file does not exist or is not of its kind, files of detections
            and checkpoints are mixed, or the files are of other images.
        ModelError: A file is not a checkpoint.
        Interrupted: The user pressed Ctrl-C.
    """
    check_positive_integers(resamples=resamples)
    if resamples < _FEWEST:
        raise InputError(f"a standard error needs {_FEWEST} resamples or more, not {resamples}")
    methods = _name_methods(sources)
    if len(methods) < 2:
        raise InputError(f"compare takes two methods or more, not {len(methods)}: the baseline comes first")
    files = list(dict.fromkeys(path for paths in methods.values() for path in paths))
    in_json = [path for path in files if Path(path).suffix.lower() == ".json"]
    if in_json and len(in_json) < len(files):
        other = next(path for path in files if path not in in_json)
        raise InputError(f"{quote(in_json[0])} holds detections and {quote(other)} does not: compare either kind alone")
    if in_json and data is None:
        raise InputError("files of detections need a ground truth: compare a.json b.json truth.json")
    if in_json and arguments:
        raise InputError(f"{next(iter(arguments))}= is for the validation of checkpoints: leave it out")
    read = _read_files(str(data), warn) if in_json else _validate_files(files, data, arguments or {}, warn)
    scores: dict[str, Scores] = {}
    truth: GroundTruth | None = None
    weights = np.empty((0, 0))
    for path in files:
        if show:
            show(f"{'reading' if in_json else 'validating'} {path}")
        found_truth, found = read(path)
        if truth is None:
            truth, weights = found_truth, draw_resamples(len(found_truth.image_ids), resamples)
        _warn_of_few(truth, found, path, warn)
        scores[path] = score_resamples(match_detections(found_truth, found), weights)
    assert truth is not None
    runs = {name: [scores[path] for path in paths] for name, paths in methods.items()}
    rows = compare_methods(runs, truth.categories)
    if all(row.over_images.verdict == NOTHING_LEARNED for row in rows if row.score == PRIMARY):
        warn(f"no method has {PRIMARY} of {LEARNED} or more: nothing was learned, and there is nothing to compare")
    return DetectorComparison(
        methods=tuple(_describe_method(name, tuple(paths), runs[name]) for name, paths in methods.items()),
        rows=tuple(rows),
        images=len(truth.image_ids),
        boxes=int((~truth.crowds).sum()),
        resamples=resamples,
        data=str(data or ""),
    )


def _name_methods(sources: Sequence[str | Path | Sequence[str | Path]]) -> dict[str, list[str]]:
    """Return the files of each method, by names that tell the methods apart."""
    listed = [[source] if isinstance(source, (str, Path)) else list(source) for source in sources]
    files = [[path for part in parts for path in _find_files(str(part))] for parts in listed]
    every = list(dict.fromkeys(path for paths in files for path in paths))
    names = dict(zip(every, name_checkpoints(list(map(Path, every))), strict=True))
    found: dict[str, list[str]] = {}
    for parts, paths in zip(listed, files, strict=True):
        given = ",".join(map(str, parts))
        name = _shorten([names[path] for path in paths])
        name = given if name in found else name
        if name in found:
            raise InputError(f"{quote(given)} is given twice")
        found[name] = paths
    return found


def _shorten(names: Sequence[str]) -> str:
    """Return the name that runs share but for a seed at its end, or else the first and the last name.

    >>> _shorten(["arelu-s0", "arelu-s1"]), _shorten(["arelu-s0"]), _shorten(["s0", "s1", "s2"])
    ('arelu', 'arelu-s0', 's0 … s2')
    """
    if len(names) == 1:
        return names[0]
    shared = {re.sub(r"[-_./ ]*(seed|s)?[-_.]*\d+$", "", name) for name in names}
    return (shared.pop() if len(shared) == 1 else "") or f"{names[0]} … {names[-1]}"


def _find_files(source: str) -> list[str]:
    """Return the files that a word names: a file, a folder, a pattern, or several of these joined by commas."""
    found: list[str] = []
    # A file may have a comma in its name.
    for part in [source] if Path(source).exists() else filter(None, map(str.strip, source.split(","))):
        check_file_name(part)
        path = Path(part)
        matches = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise InputError(f"there is no file {quote(part)}")
        found += [file for match in matches for file in _list_folder(match)]
    if not found:
        raise InputError(f"{quote(source)} names no file")
    return list(dict.fromkeys(found))


def _list_folder(path: Path) -> list[str]:
    """Return the files of detections in a folder, or else the best checkpoint of every run; a file is itself."""
    if not path.is_dir():
        return [str(path)]
    return list(map(str, sorted(path.glob("*.json")) or find_checkpoints(path)))


_Reader = Callable[[str], tuple[GroundTruth, Detections]]


def _read_files(truth_file: str, warn: Callable[[str], object]) -> _Reader:
    """Return a function that reads a file of detections."""
    opened = CocoFile(Path(truth_file))
    return lambda path: (opened.truth, opened.read_detections(Path(path), warn))


def _validate_files(
    paths: Sequence[str], data: str | Path | None, arguments: Mapping[str, Any], warn: Callable[[str], object]
) -> _Reader:
    """Return a function that validates a checkpoint, after a check that all compare."""
    names = name_checkpoints(list(map(Path, paths)))
    settings = dict(arguments) if data is None else {**arguments, "data": resolve_data(data)}
    if failures := check_comparable(dict(zip(names, paths, strict=True)), settings, warn):
        raise ModelError("; ".join(f"{name}: {why}" for name, why in failures.items()))

    def validate(path: str) -> tuple[GroundTruth, Detections]:
        model = load_checkpoint(path)
        own = {"imgsz": training_imgsz(model, DEFAULT_IMGSZ), "verbose": False, **settings}
        if "data" not in own:
            own["data"] = training_data(model)
        return collect_detections(model, **own)

    return validate


def _warn_of_few(truth: GroundTruth, found: Detections, path: str, warn: Callable[[str], object]) -> None:
    """Warn of a file without detections in many of the images that have objects: it may be of other images."""
    with_boxes = set(truth.images[~truth.crowds].tolist())
    missing = len(with_boxes - set(found.images.tolist()))
    if len(found.scores) and missing > (1 - _FEW) * len(with_boxes):
        warn(
            f"'{path}' has no detection in {missing} of {len(with_boxes)} images with labelled boxes: was it made "
            "on all of them?"
        )


def _describe_method(name: str, files: tuple[str, ...], runs: Sequence[Scores]) -> Method:
    """Return a method with the means of its scores."""
    scores = np.mean([each.observed for each in runs], axis=0)
    headlines = dict(zip(HEADLINES, map(float, scores), strict=False))
    primary = [float(each.observed[0]) for each in runs]
    return Method(name, files, headlines, summarise(primary).deviation)
