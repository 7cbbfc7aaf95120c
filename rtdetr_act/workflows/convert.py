"""Convert a trained checkpoint to another activation: swap, refit, train if need be, export, and measure each step."""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultralytics.utils.files import increment_path

from rtdetr_act.analysis.quantisation_error import QuantisationErrors
from rtdetr_act.deploy.operators import list_operators, summarise_operators
from rtdetr_act.deploy.targets import get_native_support, get_target
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, quote
from rtdetr_act.files import convert_write_errors, move_files_atomically, output_folder
from rtdetr_act.integrations.ultralytics.arguments import check_device
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data, training_data
from rtdetr_act.integrations.ultralytics.export import check_export
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.images import open_validation, training_imgsz
from rtdetr_act.integrations.ultralytics.int8 import measure_int8
from rtdetr_act.integrations.ultralytics.latency import Latency, measure_latencies
from rtdetr_act.integrations.ultralytics.log import log_level
from rtdetr_act.integrations.ultralytics.models import STOCK, load_checkpoint, save_checkpoint
from rtdetr_act.integrations.ultralytics.results import read_scores
from rtdetr_act.integrations.ultralytics.runs import run_training, slug
from rtdetr_act.integrations.ultralytics.warm_start import fit_to_reference, pick_batches
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.calibrate import calibrate, has_batch_norms
from rtdetr_act.surgery.patcher import patch_model
from rtdetr_act.surgery.plan import Plan, Scope
from rtdetr_act.surgery.sites import find_sites
from rtdetr_act.workflows.conversion import Conversion, DeployedFile, Request, Step, read_conversion
from rtdetr_act.workflows.conversion_report import write_report

AS_TRAINED, SWAPPED, REFITTED, CALIBRATED, TRAINED = "as trained", "swapped", "refitted", "calibrated", "trained"
_DEFAULT_IMGSZ = 640  # where the checkpoint does not tell
_BATCH = 16
_ROUNDS = 30  # of the latency of each file
# Settings that suit a network that is converted already: images as they are deployed on, and a small rate. On BCCD
# (yolo11n, 160 pixels), three epochs of the checkpoint itself cost it 0.6 % of its mAP at a rate of 2e-5, 2.5 % at 1e-4
# and 6 % at 1e-3.
TRAINING = {
    "optimizer": "AdamW",
    "lr0": 2e-5,
    "lrf": 0.1,
    "warmup_epochs": 0.0,
    "mosaic": 0.0,
    "mixup": 0.0,
    "close_mosaic": 0,
    "plots": False,
}
_INHERITED = ("batch", "single_cls", "cls", "rect", "fraction", "workers", "amp")  # from the training of the checkpoint


def convert_checkpoint(
    source: str | Path,
    activations: str | Sequence[str],
    data: str | Path | None = None,
    output: str | Path | None = None,
    *,
    keep: str | Sequence[str] = (),
    scope: Scope = "conv",
    target: str | None = None,
    bound: float = 0.01,
    epochs: int = 3,
    formats: str | Sequence[str] = "onnx",
    int8: bool = False,
    images: int = 128,
    arguments: Mapping[str, Any] | None = None,
    show: Callable[[str], object] | None = None,
) -> Conversion:
    """Convert a trained checkpoint to another activation, and measure what each step gains or loses.

    Each activation is swapped in and the network fitted to what it computed before, on training images without labels.
    If its score on the validation split is then more than the bound below that of the checkpoint, it is trained for a
    few epochs. The network that loses least, of those that the target runs natively if one is named, is folded,
    exported, quantised if asked for, and measured beside the checkpoint. An interrupted conversion goes on where it was
    when the same call is made again.

    Args:
        source: A .pt checkpoint, which stays as it is.
        activations: One activation or plan, or several of which the best is taken.
        data: Data set, as in Ultralytics, or "shapes"; None (default) for the one that the checkpoint was trained on.
        output: Folder of the files; None (default) for `runs/convert`, with a number if that holds another conversion.
        keep: Sites that stay as they are: sections or layers such as "head" and "22-23", or glob patterns on their
            names such as "model.23.*".
        scope: "conv" (default) for convolutional sites, "all" for transformer sites too.
        target: Deployment target, such as "rknn", whose operators the report lists. Default: None.
        bound: Largest loss of the score that needs no training, relative to the checkpoint's. Default: 0.01.
        epochs: Epochs of the training where one is needed; 0 for none. Default: 3.
        formats: Formats to export to, of "onnx" (default), "openvino", "torchscript" and "ncnn"; empty for none.
        int8: Also quantise to 8 bits, calibrated on training images.
        images: Number of training images for the fit.
        arguments: Ultralytics' training arguments, such as {"imgsz": 640, "batch": 16, "lr0": 2e-5, "device": 0}.
        show: Called with a sentence after each step.

    Returns:
        The conversion, whose files and report are in its folder.

    Raises:
        RtdetrActError: The checkpoint, an activation, the data, the target or a format is wrong, or none of the
            activations could be swapped in.
        Interrupted: The user pressed Ctrl-C.
    """
    request = check_request(
        source, activations, data, keep=keep, scope=scope, target=target, bound=bound, epochs=epochs, formats=formats,
        int8=int8, images=images, arguments=arguments,
    )  # fmt: skip
    folder = choose_folder(request, output)
    show = show or (lambda sentence: None)
    with output_folder(folder), log_level(logging.WARNING):
        found = read_conversion(folder)
        if found is not None and found.steps:
            show(f"going on with {folder}, where {len(found.steps)} steps are done")
        conversion = found or Conversion(request, folder).written()
        try:
            conversion = _measure_stock(conversion, show)
            for activation in request.activations:
                conversion = _convert_to(conversion, activation, show)
            conversion = _choose(conversion)
            conversion = _deploy(conversion, show)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"interrupted: the same command goes on in {folder}") from None
        write_report(conversion)
    return conversion


def check_request(
    source: str | Path,
    activations: str | Sequence[str],
    data: str | Path | None,
    *,
    keep: str | Sequence[str],
    scope: Scope,
    target: str | None,
    bound: float,
    epochs: int,
    formats: str | Sequence[str],
    int8: bool,
    images: int,
    arguments: Mapping[str, Any] | None,
) -> Request:
    """Check all arguments of `convert_checkpoint` before anything is done, and return them as plain data.

    Raises:
        RtdetrActError: An argument is wrong.
    """
    if not 0 <= bound < 1:
        raise InputError(f"bound is a share of the score such as 0.01, not {bound:g}")
    if epochs < 0 or images < 1:
        raise InputError(f"epochs is 0 or more and images is 1 or more, not {epochs} and {images}")
    if target is not None:
        get_target(target)
    model = load_checkpoint(source)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    settings = dict(arguments or {})
    imgsz = settings.pop("imgsz", None) or training_imgsz(model, _DEFAULT_IMGSZ)
    side = max(imgsz) if isinstance(imgsz, (list, tuple)) else int(imgsz)
    check_device(settings.get("device"))
    given = tuple(dict.fromkeys(as_list(activations)))
    if not given:
        raise InputError("there is no activation to convert to: name one, such as act=relu")
    patterns = _resolve_keep(model, as_list(keep))
    for activation in given:
        patch_model(copy.deepcopy(model), activation, exclude=patterns or None, scope=scope, init="match")
    where = resolve_data(data) if data is not None else training_data(model)
    _check_classes(model, check_data(where, str(model.task)), where)
    for name in as_list(formats):
        check_export(model, name)
    if int8:
        for name in as_list(formats):
            if name in ("onnx", "openvino"):
                check_export(model, name, int8=True)
    return Request(
        str(source), digest, given, where, side, patterns, scope, target, bound, epochs, tuple(as_list(formats)), int8,
        images, settings,
    )  # fmt: skip


def _resolve_keep(model: Any, keep: Sequence[str]) -> tuple[str, ...]:
    """Return patterns of the sites that some words name: sections, layers, or patterns themselves.

    Raises:
        InputError: A word names no site.
    """
    sites = find_sites(model)
    patterns: list[str] = []
    for word in keep:
        try:
            rule = Plan.parse("relu", layers=word, scope="all").rules[0]
            named = [site for site in sites if rule.selects(site)]
            own = sorted({f"model.{site.layer}.*" for site in named})
            covered = [site for site in sites if f"model.{site.layer}.*" in own]
            found = own if len(covered) == len(named) else [site.name for site in named]
        except RtdetrActError:  # not sections or layers
            rule = Plan.parse("relu", include=word, scope="all").rules[0]
            found = [word] if any(rule.selects(site) for site in sites) else []
        if not found:
            raise InputError(f"keep={word} names none of the model's {len(sites)} activation sites")
        patterns += found
    return tuple(dict.fromkeys(patterns))


def _check_classes(model: Any, data: Mapping[str, Any], where: str) -> None:
    """Check that a data set has the classes that a checkpoint was trained on, since its score would mean nothing."""
    if model.overrides.get("single_cls"):
        return  # its only class has a name of its own
    known = list(dict(model.names).values())
    given = list(dict(data["names"]).values()) if isinstance(data["names"], dict) else list(data["names"])
    if [str(name) for name in known] != [str(name) for name in given]:
        raise InputError(
            f"{quote(where)} has other classes ({', '.join(map(str, given[:4]))}, …) than the checkpoint was trained "
            f"on ({', '.join(map(str, known[:4]))}, …): give the data set of its training"
        )


def choose_folder(request: Request, output: str | Path | None) -> Path:
    """Return the folder of a conversion: the one given, else `runs/convert` or the first free one after it.

    Raises:
        InputError: The folder given holds a conversion that was asked for something else.
    """
    if output is not None:
        found = read_conversion(Path(output))
        if found is not None and found.request != request:
            raise InputError(f"{quote(str(output))} holds another conversion: name another folder with -o")
        return Path(output)
    base = Path("runs", "convert")
    for path in sorted(base.parent.glob("convert*"), key=lambda each: (len(each.name), each.name)):
        found = read_conversion(path)
        if found is not None and found.request == request and not found.files:
            return path
    return Path(increment_path(base))


def _measure_stock(conversion: Conversion, show: Callable[[str], object]) -> Conversion:
    if conversion.stock is not None:
        return conversion
    scores = _score(Path(conversion.request.source), conversion.request)
    step = Step(STOCK, AS_TRAINED, scores)
    if not step.score:
        raise InputError(
            f"{quote(conversion.request.source)} has a score of 0 on {quote(conversion.request.data)}: nothing can be "
            "lost, so give a checkpoint that was trained on this data"
        )
    return _add(conversion, step, show)


def _convert_to(conversion: Conversion, activation: str, show: Callable[[str], object]) -> Conversion:
    """Swap one activation in and fit the network; train it if it loses too much."""
    request = conversion.request
    folder = conversion.folder / slug(activation)
    if activation in conversion.failures:
        return conversion
    try:
        with output_folder(folder):
            if conversion.find_step(activation, SWAPPED) is None:
                conversion = _add(conversion, _swap(conversion, activation, folder), show)
            if conversion.find_step(activation, REFITTED) is None:
                conversion = _add(conversion, _refit(conversion, activation, folder), show)
            refitted = conversion.find_step(activation, REFITTED)
            assert refitted is not None
            if conversion.find_step(activation, CALIBRATED) is None:
                step = _calibrate(conversion, activation, folder)
                conversion = _add(conversion, step, show) if step else conversion
            best = _find_best(conversion, activation)
            is_due = conversion.loss(best) > request.bound and request.epochs > 0
            if is_due and conversion.find_step(activation, TRAINED) is None:
                conversion = _add(conversion, _train(conversion, activation, best, folder), show)
    except Interrupted:
        raise
    except RtdetrActError as error:
        if len(request.activations) == 1:
            raise
        show(f"{activation}: failed, {error}")
        return conversion.written(failures={**conversion.failures, activation: str(error)})
    return conversion


def _find_best(conversion: Conversion, activation: str) -> Step:
    """Return the step of an activation whose network has the highest score, the first one of several."""
    own = [step for step in conversion.steps if step.activation == activation and step.path]
    return max(own, key=lambda step: step.score)


def _add(conversion: Conversion, step: Step, show: Callable[[str], object]) -> Conversion:
    conversion = conversion.with_step(step)
    name = list(step.scores)[-1]
    loss = "" if step.activation == STOCK else f", {describe_loss(conversion.loss(step))}"
    taken = f", {step.minutes:.1f} minutes" if step.minutes else ""
    show(f"{step.activation}: {step.name}, {name} {step.score:.4f}{loss}{taken}")
    return conversion


def describe_loss(loss: float) -> str:
    """Return a relative loss in words.

    >>> describe_loss(0.0123), describe_loss(-0.004)
    ('1.2 % lost', '0.4 % gained')
    """
    return f"{abs(loss):.1%}".replace("%", " %") + (" lost" if loss >= 0 else " gained")


def _swap(conversion: Conversion, activation: str, folder: Path) -> Step:
    """Score the swap alone, as a blog post would do it."""
    request = conversion.request
    model = load_checkpoint(request.source)
    patch_model(model, activation, exclude=request.keep or None, scope=_scope(request))
    path = folder / "swapped.pt"
    save_checkpoint(model, path)
    scores = _score(path, request)
    path.unlink()
    return Step(activation, SWAPPED, scores)


def _refit(conversion: Conversion, activation: str, folder: Path) -> Step:
    request, started = conversion.request, time.monotonic()
    model = load_checkpoint(request.source)
    patch_model(model, activation, exclude=request.keep or None, scope=_scope(request), init="match")
    fit_to_reference(model.model, _open_training(model, request), request.images)
    return _save_step(conversion, model, activation, REFITTED, folder, started)


def _calibrate(conversion: Conversion, activation: str, folder: Path) -> Step | None:
    """Estimate the statistics of BatchNorm anew; None without BatchNorm."""
    started = time.monotonic()
    model = load_checkpoint(folder / f"{REFITTED}.pt")
    if not has_batch_norms(model.model):
        return None
    calibrate(model, pick_batches(_open_training(model, conversion.request), conversion.request.images))
    return _save_step(conversion, model, activation, CALIBRATED, folder, started)


def _save_step(conversion: Conversion, model: Any, activation: str, name: str, folder: Path, started: float) -> Step:
    path = folder / f"{name}.pt"
    save_checkpoint(model, path)
    minutes = (time.monotonic() - started) / 60
    scores = _score(path, conversion.request)
    return Step(activation, name, scores, minutes, path=path.relative_to(conversion.folder).as_posix())


def _train(conversion: Conversion, activation: str, best: Step, folder: Path) -> Step:
    """Train for a few epochs, or go on with a training that was interrupted."""
    request, started = conversion.request, time.monotonic()
    last = folder / "train" / "weights" / "last.pt"
    model = load_checkpoint(last if last.exists() else conversion.folder / best.path)
    saved = (model.ckpt or {}).get("epoch", -1)
    if last.exists() and saved >= 0 and model.ckpt.get("optimizer") is not None:
        with log_level(logging.INFO):
            run_training(model, resume=True)
    elif not last.exists():
        inherited = (model.ckpt or {}).get("train_args") or {}
        settings = {
            **{key: inherited[key] for key in _INHERITED if key in inherited},
            **TRAINING,
            **request.arguments,
            "data": request.data,
            "imgsz": request.imgsz,
            "epochs": request.epochs,
            "project": str(folder.resolve()),
            "name": "train",
            "exist_ok": True,
        }
        with log_level(logging.INFO):
            run_training(model, **settings)
    path = folder / "train" / "weights" / "best.pt"
    minutes = (time.monotonic() - started) / 60
    scores = _score(path, request)
    relative = path.relative_to(conversion.folder).as_posix()
    return Step(activation, TRAINED, scores, minutes, request.epochs, relative)


def _open_training(model: Any, request: Request) -> Any:
    """Return the training split as a data set of a validation, without augmentation."""
    data = check_data(request.data, str(model.task))
    return open_validation(model, {**data, "val": data["train"]}, request.imgsz)[1]


def _scope(request: Request) -> Scope:
    return "all" if request.scope == "all" else "conv"


def _score(path: Path, request: Request) -> dict[str, float]:
    """Return the scores of a checkpoint on the validation split."""
    model = load_checkpoint(path)
    device = request.arguments.get("device")
    settings = {"data": request.data, "imgsz": request.imgsz, "batch": _BATCH, "plots": False, "verbose": False}
    if device is not None:
        settings["device"] = device
    with tempfile.TemporaryDirectory() as folder, translate_errors(**settings):
        return read_scores(model.val(**settings, workers=0, project=folder, name="val"))


def _choose(conversion: Conversion) -> Conversion:
    """Take the network that loses least, of those whose activations the target runs natively if there are any."""
    if conversion.kept is not None:
        return conversion
    tried = [name for name in conversion.request.activations if name not in conversion.failures]
    if not tried:
        raise InputError("; ".join(f"{name}: {failure}" for name, failure in conversion.failures.items()))
    native = [name for name in tried if _is_native(name, conversion.request.target)]
    kept = max((_find_best(conversion, name) for name in native or tried), key=lambda step: step.score)
    return conversion.written(winner=kept.activation, kept=kept)


def _is_native(activation: str, target: str | None) -> bool:
    """Return whether a target runs all activations of a plan natively; True without a target."""
    names = {rule.activation.name for rule in Plan.parse(activation).rules}
    return target is None or all(get_native_support(name, target) is not None for name in names)


def _deploy(conversion: Conversion, show: Callable[[str], object]) -> Conversion:
    """Fold and export the network taken, and measure it beside the checkpoint."""
    if conversion.files:
        return conversion
    request, kept = conversion.request, conversion.kept
    assert kept is not None
    stem = f"{Path(request.source).stem}-{slug(kept.activation)}"
    models = {STOCK: load_checkpoint(request.source), kept.activation: load_checkpoint(conversion.folder / kept.path)}
    show(f"{kept.activation}: measuring the checkpoint and {', '.join(request.formats) or 'no format'}")
    with tempfile.TemporaryDirectory(dir=conversion.folder, prefix=".deploy-") as stage:
        latencies = measure_latencies(
            models, request.formats, Path(stage), imgsz=request.imgsz, rounds=_ROUNDS, int8=request.int8,
            data=request.data,
        )  # fmt: skip
        quantisation = _measure_quantisation(request, models, latencies) if request.int8 else {}
        moves, files = {}, []
        for each in latencies:
            name = Path(each.path).name.replace("model", stem, 1) if each.activation != STOCK else ""
            if name:
                moves[conversion.folder / name] = Path(each.path)
            files.append(
                DeployedFile(
                    each.activation,
                    each.format,
                    each.scores or {},
                    each.median,
                    each.ratio.median,
                    each.megabytes,
                    name,
                )
            )
        with convert_write_errors(conversion.folder):
            move_files_atomically(moves)
    conversion = conversion.written(files=tuple(files), quantisation=quantisation)
    onnx = next((conversion.folder / each.path for each in files if each.format == "onnx" and each.path), None)
    if request.target is None or onnx is None:
        return conversion
    rows = list_operators(onnx, request.target)
    return conversion.written(
        operators=summarise_operators(rows, request.target), operator_rows=tuple(asdict(row) for row in rows)
    )


def _measure_quantisation(
    request: Request, models: Mapping[str, Any], latencies: Sequence[Latency]
) -> dict[str, QuantisationErrors]:
    """Measure the error of each tensor of the ONNX files in 8 bits, by activation; nothing without such files."""
    paths = {(each.activation, each.format): Path(each.path) for each in latencies}
    found = {}
    for name, model in models.items():
        quantised = paths.get((name, "onnx int8"))
        if quantised is not None:
            data = check_data(request.data, str(model.task))
            found[name] = measure_int8(model, paths[name, "onnx"], quantised, data, request.imgsz)
    return found
