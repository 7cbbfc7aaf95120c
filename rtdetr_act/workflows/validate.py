"""Validate checkpoints, and swaps that were not trained, under the same settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from ultralytics.utils.torch_utils import select_device

from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.analysis.inventory import compare_sites
from rtdetr_act.deploy.fold import FoldReport, fold_activations
from rtdetr_act.errors import Interrupted, RtdetrActError, reason
from rtdetr_act.integrations.ultralytics.arguments import check_file_name, set_project
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data, training_data
from rtdetr_act.integrations.ultralytics.failures import existing_folders, remove_empty_folders, translate_errors
from rtdetr_act.integrations.ultralytics.images import open_validation, training_imgsz
from rtdetr_act.integrations.ultralytics.models import STOCK, load_checkpoint, load_variant
from rtdetr_act.integrations.ultralytics.rebuilding import rebuild
from rtdetr_act.integrations.ultralytics.results import format_scores, list_score_names, read_scores
from rtdetr_act.integrations.ultralytics.run_folders import find_checkpoints, name_checkpoints
from rtdetr_act.integrations.ultralytics.runs import count_sites, slug
from rtdetr_act.integrations.ultralytics.warm_start import fit_to_reference
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.plan import SwapOptions
from rtdetr_act.surgery.sites import find_sites
from rtdetr_act.workflows.comparable import DEFAULT_IMGSZ, check_comparable
from rtdetr_act.workflows.examination import summarise_differences

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, repr=False)
class Validation(Result):
    """Outcome of the validation of one checkpoint or variant.

    Attributes:
        name: Name that tells it from the others: the run folder of a checkpoint, the activation of a variant.
        source: The checkpoint.
        activation: The plan of the network that was validated, before a fold; "stock" without one, with the
            activations that stand elsewhere than `model.yaml` says.
        sites: Number of sites whose activation was swapped.
        parameters: Number of parameters of the whole model.
        gflops_640: Floating-point operations of one image of 640 x 640 pixels, activations included, in 1e9.
        imgsz: Side of the images, in pixels.
        data: The data set.
        scores: The two headline scores of the task, as fractions of 1, such as {"mAP50": …, "mAP50-95": …}; None if
            the validation failed.
        folder: Folder of Ultralytics' own files; None if there are none, or the validation failed.
        failure: Why it failed, in one sentence; "" if it did not.
    """

    name: str
    source: str
    activation: str = ""
    sites: int = 0
    parameters: int = 0
    gflops_640: float = 0.0
    imgsz: int = 0
    data: str = ""
    scores: dict[str, float] | None = None
    folder: Path | None = None
    failure: str = ""

    def _summarise(self) -> str:
        """Return the name, and the scores or why there are none."""
        scores = format_scores(self.scores)
        return ", ".join([self.name, *([f"failed: {self.failure}"] if self.failure else scores)])


@dataclass(frozen=True, repr=False)
class ValidationTable(TableResult):
    """Validations as a table with a row each, their settings included.

    Attributes:
        validations: The validations.
    """

    validations: tuple[Validation, ...]

    def _summarise(self) -> str:
        """Return the names of the validations."""
        return ", ".join(each.name for each in self.validations)

    def _make_table(self) -> Table:
        """Return a row per validation; of one that failed, what was counted and scored is unknown."""
        scores = list_score_names(each.scores for each in self.validations)
        counts = ("sites", "parameters", "gflops_640")
        columns = ("name", "activation", *counts, *scores, "imgsz", "data", "source", "folder", "failure")
        return columns, (
            (
                each.name,
                each.activation,
                *(getattr(each, count) if each.scores else None for count in counts),
                *((each.scores or {}).get(score) for score in scores),
                each.imgsz or None,
                each.data,
                each.source,
                each.folder,
                each.failure,
            )
            for each in self.validations
        )


def validate_checkpoints(
    sources: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    fold: bool = False,
    show_fold: Callable[[FoldReport], object] | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[Validation]:
    """Validate checkpoints one after the other on the same data and image size; yield each when it has ended.

    All are loaded once before the first of them is validated, so that settings under which they do not compare are
    reported at once.

    Args:
        sources: Checkpoints, or folders, in which the best.pt of every run is taken.
        data: Data set, as in Ultralytics, or "shapes"; None (default) for the one that all of them were trained on.
        arguments: Ultralytics' validation arguments, such as {"imgsz": 640, "batch": 16}. The image size is that of
            their training unless it is among them. Results go to `runs/<task>` unless `project` says otherwise.
        fold: Fold the activations into the weights first, in memory only.
        show_fold: Called with the report of each fold before the validation starts.
        warn: Called with each warning, one sentence, before the first validation starts.

    Yields:
        Validations in the order of the sources. Where there are several, one that fails has `failure` set, and the next
        one is validated.

    Raises:
        InputError: A checkpoint or the data set does not exist, Ultralytics cannot use an argument, or the checkpoints
            were trained on different data or image sizes and none is given for all of them.
        ModelError: The only file is not a checkpoint, or holds a class that is not installed.
        FoldError: The fold would change what the only model computes.
        Interrupted: The user pressed Ctrl-C.
    """
    paths = _find_files([sources] if isinstance(sources, (str, Path)) else sources)
    names = name_checkpoints([Path(path) for path in paths])
    settings = dict(arguments or {})
    if data is not None:
        settings["data"] = resolve_data(data)
    several = len(paths) > 1
    failures = check_comparable(dict(zip(names, paths, strict=True)), settings, warn) if several else {}

    def validate(name: str, path: str) -> Validation:
        model = load_checkpoint(path)
        return _validate(name, path, model, _name_results(settings, model, name if several else None), fold, show_fold)

    for name, path in zip(names, paths, strict=True):
        if name in failures:
            yield Validation(name, path, failure=failures[name])
        else:
            yield _attempt(validate, name, path, several=several)


def validate_variants(
    source: str | Path,
    activations: str | Sequence[str],
    data: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    fold: bool = False,
    show_fold: Callable[[FoldReport], object] | None = None,
    **options: Unpack[SwapOptions],
) -> Iterator[Validation]:
    """Validate variants of a checkpoint without training them; yield each validation when it has ended.

    With `init="match"` a variant is fitted first as a training fits it at its start, on images of the training split,
    without augmentation.

    Args:
        source: A .pt checkpoint.
        activations: Plans, as `patch_model` takes them; "stock" for the network without any swap, which comes first.
        data: As in `validate_checkpoints`; None (default) for the data set that the checkpoint was trained on.
        arguments: As in `validate_checkpoints`.
        fold: As in `validate_checkpoints`.
        show_fold: As in `validate_checkpoints`.
        **options: `scope`, `act_lr`, `init`, `replaces` and `memory` of `patch_model`.

    Yields:
        Validations, that of the stock network first. Where there are several, one that fails has `failure` set, and the
        next one is validated.

    Raises:
        RtdetrActError: The checkpoint, a plan or the data is wrong, or the only variant failed.
        Interrupted: The user pressed Ctrl-C.
    """
    source = str(source)
    given = [activations] if isinstance(activations, str) else activations
    ordered = sorted(dict.fromkeys(given), key=lambda activation: activation != STOCK)
    model = load_checkpoint(source)
    settings = {**(arguments or {}), "data": training_data(model) if data is None else resolve_data(data)}
    several = len(ordered) > 1
    for activation in ordered:  # before minutes of validating
        load_variant(source, activation, **options)

    def validate(name: str, path: str) -> Validation:
        _, model = load_variant(path, name, **options)
        if read_plan(model.model).needs_fit:
            _fit(model, settings)
        return _validate(name, path, model, _name_results(settings, model, name if several else None), fold, show_fold)

    for activation in ordered:
        yield _attempt(validate, activation, source, several=several)


def _find_files(sources: Sequence[str | Path]) -> list[str]:
    """Return the checkpoints that some files and folders are, each once."""
    found: dict[Path, str] = {}
    for source in map(str, sources):
        check_file_name(source)
        for path in map(str, find_checkpoints(Path(source))) if Path(source).is_dir() else [source]:
            found.setdefault(Path(path).absolute(), path)
    return list(found.values())


def _name_results(settings: Mapping[str, Any], model: Any, name: str | None) -> dict[str, Any]:
    """Return the arguments of one validation, with the folder of its results.

    Args:
        settings: The arguments for all validations.
        model: RTDETR or YOLO object.
        name: Name of this one; None if it is the only one.
    """
    folder = settings.get("name") or "val"
    own = {**settings, "name": folder if name is None else f"{folder}-{slug(name)}"}
    set_project(own, str(model.task))
    return own


def _attempt(validate: Callable[[str, str], Validation], name: str, path: str, *, several: bool) -> Validation:
    """Validate one of several, and return why it failed if it did, so that the scores of the others are not lost."""
    try:
        return validate(name, path)
    except Exception as error:
        if not several or isinstance(error, Interrupted):
            raise
        sentence = str(error) if isinstance(error, RtdetrActError) else f"{type(error).__name__}: {reason(error)}"
        return Validation(name, path, failure=sentence)


def _validate(
    name: str,
    path: str,
    model: Any,
    settings: dict[str, Any],
    fold: bool,
    show_fold: Callable[[FoldReport], object] | None,
) -> Validation:
    """Validate a model, which it changes: Ultralytics fuses it."""
    activation, sites = _describe_activation(model.model)
    if fold:
        report = fold_activations(model)
        if show_fold:
            show_fold(report)
    if "data" not in settings:
        settings["data"] = training_data(model)
    imgsz = settings.get("imgsz") or training_imgsz(model, DEFAULT_IMGSZ)
    size = max(imgsz) if isinstance(imgsz, (list, tuple)) else int(imgsz)
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    gflops = count_gflops(model.model)
    folders: list[Path] = []
    model.add_callback("on_val_end", lambda validator: folders.append(Path(validator.save_dir)))
    existing = existing_folders(settings)
    with translate_errors(**settings):
        scores = read_scores(model.val(**settings))
    for each in folders:
        remove_empty_folders(each, existing)
    folder = next((each for each in folders if each.exists()), None)  # with plots=False there is no file in it
    return Validation(
        name, path, activation, sites, parameters, gflops, size, str(settings["data"]), scores, folder=folder
    )


def _describe_activation(root: nn.Module) -> tuple[str, int]:
    """Return the plan of a network, or in which activations it differs from the stock one, and the number of sites."""
    plan = read_plan(root)
    if plan:
        return str(plan), count_sites(root)
    try:
        built = rebuild(root)
    except RtdetrActError:  # it has layers that were defined in a script
        return "unknown", 0
    differences = compare_sites(root, find_sites(root), built.network, built.sites)
    return f"{STOCK} but {summarise_differences(differences)}" if differences else STOCK, len(differences)


def _fit(model: Any, settings: Mapping[str, Any]) -> None:
    """Fit a variant to the checkpoint as a training does at its start."""
    root = unwrap(model)
    imgsz = settings.get("imgsz") or training_imgsz(model, DEFAULT_IMGSZ)
    size = max(imgsz) if isinstance(imgsz, (list, tuple)) else int(imgsz)
    data = check_data(str(settings["data"]), str(model.task))
    _, dataset = open_validation(model, {**data, "val": data["train"]}, size)
    with translate_errors():
        root.to(select_device(settings.get("device") or "", verbose=False))
    fit_to_reference(root, dataset)
