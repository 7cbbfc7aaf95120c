"""Commands that run Ultralytics: train, val, predict, resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_act.cli.app import app
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError, TrainingError, quote
from rtdetr_act.surgery.plan import SwapOptions

if TYPE_CHECKING:
    from rtdetr_act.integrations.ultralytics.runs import Outcome

DEFAULT_MODEL = "rtdetr-n.yaml"
DEFAULT_DATA = "shapes"

Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]…", help="Any Ultralytics argument, such as epochs=100 imgsz=640 batch=16."),
]
Weights = Annotated[str, typer.Argument(help="A checkpoint, such as runs/detect/rtdetr-n-arelu/weights/best.pt.")]
TargetOption = Annotated[
    str | None,
    typer.Option("--for", help="Warn of activations that rknn, hailo, edgetpu, vitis-dpu or openvino does not run."),
]
Fold = Annotated[bool, typer.Option("--fold", help="Fold the activations into the weights first.")]
Data = Annotated[str | None, typer.Option("--data", help="Data set YAML, or 'shapes', the embedded one.")]


@app.command()
def train(
    pairs: Pairs = None,
    act: Annotated[
        list[str] | None,
        typer.Option(
            "--act",
            help="Activation or plan, such as arelu or 'dyrelu_b@backbone, dyrelu_c@neck'; 'stock'; repeatable.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Model YAML or checkpoint; shipped ones by bare name.")
    ] = DEFAULT_MODEL,
    data: Annotated[str, typer.Option("--data", help="Data set YAML, or 'shapes', the embedded one.")] = DEFAULT_DATA,
    scope: Annotated[str, typer.Option("--scope", help="conv, or all to swap transformer sites too.")] = "conv",
    act_lr: Annotated[float, typer.Option("--act-lr", help="Factor on the learning rate of slopes.")] = 1.0,
    conv: Annotated[
        str | None,
        typer.Option(
            "--conv", help="Convolutions to put in, such as dynamic_conv or 'dynamic_conv(kernels=2)@backbone'."
        ),
    ] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Checkpoint to take weights from.")] = None,
    init: Annotated[
        str, typer.Option("--init", help="paper, or match to start closest to the network before the swap.")
    ] = "paper",
    target: TargetOption = None,
) -> None:
    """Train a model with other activations; several --act train one after the other and end in one table."""
    from rtdetr_act.integrations.ultralytics.arguments import check_device, parse_arguments
    from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
    from rtdetr_act.integrations.ultralytics.models import STOCK, check_variants, load_model, load_variant
    from rtdetr_act.integrations.ultralytics.runs import Outcome, slug
    from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
    from rtdetr_act.workflows.train import train_variant

    arguments = parse_arguments(pairs or [], taken=("model", "data", "pretrained", "task", "mode", "resume"))
    variants: list[str | None] = [*act] if act else [None]
    how: SwapOptions = {"scope": scope, "act_lr": act_lr, "init": init}
    usual: SwapOptions = {"scope": "conv", "act_lr": 1.0, "init": "paper"}
    if how != usual and not [name for name in variants if name not in (None, STOCK)]:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in usual)
        raise InputError(f"{options} say how an activation is swapped in: name one with --act")
    if conv is not None and set(variants) == {STOCK}:
        raise InputError("'stock' is the model without --conv as well: leave --act out to train --conv alone")
    if pretrained is not None:
        if not pretrained.endswith(".pt"):
            raise InputError(f"--pretrained takes a .pt checkpoint, not {quote(pretrained)}")
        load_model(pretrained)
        arguments["pretrained"] = pretrained
    if data == DEFAULT_DATA:
        arguments = {**SHAPES_SETTINGS, **arguments}
    task = check_variants(model, variants, conv=conv, **how)
    for variant in variants if target else ():
        warn_for(load_variant(model, variant, scope=scope)[1], target)
    arguments["data"] = resolve_data(data)
    check_data(arguments["data"], task)
    check_device(arguments.get("device"))
    arguments.setdefault("project", str(Path("runs", task).absolute()))

    outcomes: list[Outcome] = []
    try:
        for variant in variants:
            settings = dict(arguments)
            if len(variants) > 1 and "name" in settings:  # with exist_ok=True they would overwrite one another
                settings["name"] = f"{settings['name']}-{slug(str(variant))}"
            try:
                outcomes.append(train_variant(model, variant, settings, conv=conv, **how))
            except RtdetrActError as error:
                if len(variants) == 1 or isinstance(error, Interrupted):
                    raise
                outcomes.append(Outcome(str(variant), failure=str(error)))
    finally:
        _print_outcomes(outcomes)
    if failed := [outcome.activation for outcome in outcomes if outcome.failure]:
        raise TrainingError(f"{len(failed)} of {len(outcomes)} variants gave no result: {', '.join(failed)}")


@app.command()
def val(weights: Weights, pairs: Pairs = None, data: Data = None, fold: Fold = False) -> None:
    """Validate a checkpoint, on the data it was trained with unless --data names another."""
    from rtdetr_act.integrations.ultralytics.datasets import training_data
    from rtdetr_act.integrations.ultralytics.failures import one_sentence

    model, arguments = prepare(weights, pairs, data, fold=fold)
    if data is None:
        arguments["data"] = training_data(model)
    with one_sentence(**arguments):
        _print_scores(model.val(**arguments))


@app.command()
def predict(weights: Weights, pairs: Pairs = None, fold: Fold = False) -> None:
    """Detect in images or videos: source=folder, conf=0.25, save=True and so on."""
    from rtdetr_act.integrations.ultralytics.failures import one_sentence

    model, arguments = prepare(weights, pairs, None, fold=fold)
    source = arguments.pop("source", None)
    if source is None:
        raise InputError("predict needs something to look at: add source=image.jpg (or a folder, a video, a URL)")
    is_path = isinstance(source, str) and "://" not in source and not any(mark in source for mark in "*?[")
    if is_path and not Path(source).exists():
        raise InputError(f"there is no source {quote(source)}")
    arguments.setdefault("save", True)
    with one_sentence(**arguments):
        for _ in model.predict(source=source, stream=True, **arguments):
            pass  # a stream, so that a long video is never held in memory whole
    print(f"files: {model.predictor.save_dir}")


@app.command()
def resume(weights: Weights, pairs: Pairs = None) -> None:
    """Go on with a training that was interrupted: give its last.pt."""
    from rtdetr_act.integrations.ultralytics.runs import run_training

    model, arguments = prepare(weights, pairs, None)
    if (model.ckpt or {}).get("epoch", -1) < 0 or model.ckpt.get("optimizer") is None:
        raise InputError(f"{quote(weights)} is of a finished training: resume takes the last.pt of an interrupted one")
    _print_scores(run_training(model, resume=True, **arguments))
    print(f"files: {model.trainer.save_dir}")


def prepare(
    weights: str, pairs: list[str] | None, data: str | None, *, fold: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return the model of a checkpoint, folded or not, and Ultralytics' arguments; raises RtdetrActError."""
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
    from rtdetr_act.integrations.ultralytics.datasets import resolve_data
    from rtdetr_act.integrations.ultralytics.models import load_model

    arguments = parse_arguments(pairs or [], taken=("model", "task", "mode", "resume", "data"))
    if not weights.endswith(".pt"):
        raise InputError(f"{quote(weights)} is not a checkpoint: give a .pt file")
    model = load_model(weights)
    if data is not None:
        arguments["data"] = resolve_data(data)
    if fold:
        from rtdetr_act.deploy.fold import fold_activations

        print(fold_activations(model))
    return model, arguments


def warn_for(model: Any, target: str | None) -> None:
    """Warn, on stderr, of activations that a target does not run natively; raises InputError for an unknown one."""
    if target is None:
        return
    from rtdetr_act.deploy.targets import warnings_for

    for sentence in warnings_for(model, target):
        print(f"warning: {sentence}", file=sys.stderr)


def _print_scores(metrics: Any) -> None:
    from rtdetr_act.integrations.ultralytics.results import read_scores

    print("  ".join(f"{name} {score:.4f}" for name, score in read_scores(metrics).items()))


def _print_outcomes(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not outcomes:
        return
    scores = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores or {})) or ["mAP50", "mAP50-95"]
    table = Table(title="Variants, scored on their best checkpoint")
    table.add_column("activation", overflow="fold")
    for title in ("sites", "parameters", "GFLOPs", *scores, "s/epoch"):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        if outcome.failure:
            table.add_row(outcome.activation, *["-"] * (4 + len(scores)))
            continue
        cells = [f"{(outcome.scores or {}).get(name, float('nan')):.4f}" for name in scores]
        time = f"{outcome.seconds_per_epoch:.1f}"
        counts = str(outcome.sites), f"{outcome.parameters:,}", f"{outcome.gflops:.2f}"
        table.add_row(outcome.activation, *counts, *cells, time)
    Console().print(table)
    for outcome in outcomes:
        print(f"{outcome.activation}: {outcome.failure or outcome.folder}")
